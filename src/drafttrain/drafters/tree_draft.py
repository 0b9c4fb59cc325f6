"""Drafting trees: the length policy, the draws, which nodes to read, and the proposals.

A kind computes the logits after the nodes of the frontiers; what to draft from them is decided here, the same for all kinds
and for all forms of trees.

M = frontier nodes of all sequences, N = rows, W = width of the drafter's head, R = tokens that can be drafted, D = hidden,
K = children of a node at most, V = the target's vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from drafttrain.core.probability import draw_in_order, sampling_probs
from drafttrain.core.proposals import (
    Budget,
    Context,
    DraftStep,
    DrawMode,
    More,
    NodeKind,
    Proposal,
    fixed_tree,
)
from drafttrain.core.texts import Sampling
from drafttrain.core.tree_growth import Child, TreeGrowth
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.dynamic_tree import DynamicTree

Draw = Callable[..., tuple[Tensor, Tensor]]
"""`core.probability.draw_in_order`, or what stands for it in an enumeration of all draws."""


@dataclass(frozen=True)
class DraftNode:
    """A draft token whose children will be drafted: the drafter must read it."""

    token: int
    """The target's id."""
    depth: int
    parent: int
    """Number of its parent in the order in which the draft's nodes were read; -1: the committed text."""
    state_D: Tensor | None
    """The state that the token was drafted from."""


@dataclass
class _Tree:
    """The tree of one sequence, and what is known of its nodes."""

    sequence: int
    growth: TreeGrowth
    generator: torch.Generator
    read: dict[int, int] = field(default_factory=lambda: {0: -1})
    """By node, its number in the order of reading; -1 for the root, which is committed text."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """By node that was read, the state after it."""
    rows: dict[int, Tensor] = field(default_factory=dict)
    """By node, the distribution over the tokens that can be drafted, from which its children were drawn."""


@dataclass(frozen=True)
class Rows:
    """The drafter's logits after some nodes."""

    logits_NR: Tensor
    sampling: Sampling | None
    """None: children are the likeliest tokens."""

    @cached_property
    def probs_NR(self) -> Tensor:
        """The distributions that children are drawn from."""
        assert self.sampling is not None
        return sampling_probs(self.logits_NR, self.sampling)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (places_NK, log_q_NK) of the likeliest tokens."""
        wide = torch.promote_types(self.logits_NR.dtype, torch.float32)
        found = self.logits_NR.log_softmax(dim=-1, dtype=wide).topk(count, dim=-1)
        return found.indices, found.values


class Trees:
    """The trees of one round, one per sequence. As long as some grow, compute the next logits and call `extend`."""

    def __init__(
        self,
        trees: Sequence[_Tree],
        *,
        vocabulary: DraftVocabulary,
        vocab_size: int,
        sampling: Sampling | None,
        mode: DrawMode,
        more: Callable[[DraftStep], bool | More],
        draw: Draw,
    ) -> None:
        self._trees = trees
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._sampling = sampling
        self._mode = mode
        self._more = more
        self._draw = draw

    @property
    def growing(self) -> list[int]:
        """The sequences whose trees grow."""
        return [tree.sequence for tree in self._trees if tree.growth.frontier]

    @property
    def open(self) -> list[tuple[int, int]]:
        """(sequence, depth) of every frontier node. `extend` expects logits of these, in this order."""
        return [(tree.sequence, tree.growth.depths[node]) for tree, node in self._open()]

    @property
    def frontiers(self) -> list[list[DraftNode]]:
        """By sequence, the draft tokens to read; the root, which is committed text, is not among them."""
        return [[self._node(tree, node) for node in tree.growth.frontier if node] for tree in self._trees]

    def where_growing(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """Return, by sequence, these rows if its tree grows, or none."""
        return [own if tree.growth.frontier else [] for own, tree in zip(rows, self._trees, strict=True)]

    def extend(
        self,
        logits_MW: Tensor,
        states_MD: Tensor | None = None,
        confidence_M: Tensor | None = None,
        *,
        carried_MD: Tensor | None = None,
    ) -> None:
        """Add children to the frontier nodes. The device is read once for all trees.

        Args:
            logits_MW: After each frontier node, in the order of `open`.
            states_MD: The states that the logits were computed from, for a length policy that reads them.
            confidence_M: The logits of the predicted acceptance of their children.
            carried_MD: What `DraftNode.state_D` of their children is; None: `states_MD`.
        """
        rows = self._rows(logits_MW)
        places = range(len(logits_MW))
        self._grow(
            places,
            self._children(rows, places, most=self._wanted()),
            rows,
            states_MD,
            confidence_M,
            states_MD if carried_MD is None else carried_MD,
        )

    def extend_to_the_end(self, logits_SKW: Tensor, states_SKD: Tensor) -> None:
        """Grow all trees whose distribution at a depth does not depend on the node: that of the sequence's slot there.

        Without draws all nodes of a level have the same children, and the device is read once.

        Args:
            logits_SKW: By sequence and depth.
            states_SKD: The states that the logits were computed from.
        """
        slots = logits_SKW.shape[1]
        rows, states_ND = self._rows(logits_SKW.flatten(0, 1)), states_SKD.flatten(0, 1)
        known = None
        if self._sampling is None and self.growing:
            most = max(tree.growth.budget.width for tree in self._trees)
            known = self._children(rows, range(len(rows.logits_NR)), most=most)
        while self.growing:
            places = [sequence * slots + depth for sequence, depth in self.open]
            children = (
                self._children(rows, places, most=self._wanted())
                if known is None
                else [known[place] for place in places]
            )
            self._grow(places, children, rows, states_ND)

    def _wanted(self) -> int:
        return max((tree.growth.wanted for tree, _ in self._open()), default=0)

    def _open(self) -> Iterator[tuple[_Tree, int]]:
        return ((tree, node) for tree in self._trees for node in tree.growth.frontier)

    def _node(self, tree: _Tree, node: int) -> DraftNode:
        growth, parent = tree.growth, tree.growth.parents[node]
        return DraftNode(growth.tokens[node], growth.depths[node], tree.read[parent], tree.states.get(parent))

    def _rows(self, logits_NW: Tensor) -> Rows:
        return Rows(self._vocabulary.logits(logits_NW), self._sampling)

    def _children(self, rows: Rows, places: Sequence[int], *, most: int) -> list[list[Child]]:
        """Return up to `most` possible children of nodes with these rows, in draw order."""
        count = min(most, rows.logits_NR.shape[-1])
        if self._sampling is None:
            places_MK, log_q_MK = rows.best(count)
        else:
            probs_MR = rows.probs_NR
            if list(places) != list(range(len(probs_MR))):
                probs_MR = probs_MR.index_select(0, torch.tensor(list(places)).to(probs_MR.device))
            generators = [tree.generator for tree, _ in self._open()]
            places_MK, q_MK = self._draw(probs_MR, generators, count=count, mode=self._mode)
            log_q_MK = q_MK.log()
        # One read of the device for both; float64 holds probabilities and ids exactly.
        ids, scores = torch.stack([places_MK.double(), log_q_MK.double()]).tolist()
        return [
            [(token, log_q) for token, log_q in zip(self._vocabulary.ids([int(i) for i in of]), own, strict=True)
             if log_q > -math.inf]
            for of, own in zip(ids, scores, strict=True)
        ]  # fmt: skip

    def _grow(
        self,
        places: Sequence[int],
        children: Sequence[list[Child]],
        rows: Rows,
        states_ND: Tensor | None = None,
        confidence_N: Tensor | None = None,
        carried_ND: Tensor | None = None,
    ) -> None:
        """Offer children to the growths, of nodes for which the length policy wants any."""
        offered = iter(zip(places, children, strict=True))
        for tree in self._trees:
            growth, taken = tree.growth, []
            for node in growth.frontier:
                place, own = next(offered)
                if node:
                    tree.read[node] = len(tree.read) - 1
                if carried_ND is not None:
                    tree.states[node] = carried_ND[place]
                if self._sampling is not None:
                    tree.rows[node] = rows.probs_NR[place]
                step = DraftStep(
                    tree.sequence,
                    growth.depths[node] + 1,
                    rows.logits_NR[place],
                    None if states_ND is None else states_ND[place],
                    growth.tokens[node],
                    None if confidence_N is None else confidence_N[place],
                )
                taken.append(own if self._more(step) else [])
            if taken:
                growth.grow(taken)

    def proposals(self) -> list[Proposal]:
        """Return the tree of each sequence; drawn nodes with their distributions over the target's vocabulary."""
        return [self._proposal(tree) for tree in self._trees]

    def reads(self) -> list[list[int | None]]:
        """Return, by sequence and node of its proposal, the number of the node in the order of reading; None: it was not read."""
        return [[tree.read.get(node) for node in (0, *tree.growth.chosen())] for tree in self._trees]

    def _proposal(self, tree: _Tree) -> Proposal:
        growth = tree.growth
        nodes = growth.chosen()
        place = {0: 0} | {node: number for number, node in enumerate(nodes, start=1)}
        parents = [growth.parents[node] for node in nodes]
        if self._sampling is None or not nodes:
            return fixed_tree(
                growth.tokens[0], [(growth.tokens[node], place[p]) for node, p in zip(nodes, parents, strict=True)]
            )
        drawn_from = {node: row for row, node in enumerate(dict.fromkeys(parents))}
        q_rows_RR = torch.stack([tree.rows[node] for node in drawn_from])
        kinds = [NodeKind.ROOT.value] + [NodeKind.SAMPLED.value] * len(nodes)
        return Proposal(
            tokens_N=torch.tensor([growth.tokens[node] for node in (0, *nodes)]),
            parents_N=torch.tensor([-1, *(place[parent] for parent in parents)]),
            depths_N=torch.tensor([growth.depths[node] for node in (0, *nodes)]),
            kinds_N=torch.tensor(kinds),
            q_rows_RV=self._vocabulary.over_target(q_rows_RR, size=self._vocab_size),
            q_row_N=torch.tensor([drawn_from.get(node, -1) for node in (0, *nodes)]),
            draw=self._mode,
        )


@dataclass(frozen=True)
class TreeDraft:
    """How a drafter drafts trees. Without a form they are EAGLE-2's, whose nodes are FIXED at every temperature."""

    vocabulary: DraftVocabulary
    vocab_size: int
    """Of the target: the width of the rows of q."""
    draft: str = "sampled"
    """`sampled`, or `greedy`: FIXED nodes at every temperature."""
    draw: Draw = draw_in_order

    def begin(
        self,
        contexts: Sequence[Context],
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> Trees:
        """Return the trees of a round, which have their roots only. All budgets have the form of one length policy."""
        form = next((budget.form for budget in budgets if budget.form is not None), None)
        drawn = form is not None and self.draft != "greedy" and sampling.temperature > 0
        trees = []
        for number, (context, budget, generator) in enumerate(zip(contexts, budgets, generators, strict=True)):
            root = context.tokens[-1]
            growth: TreeGrowth
            if form is None:
                growth = DynamicTree(root, budget)
            else:
                growth = form.start(root, budget, _uniform(generator) if drawn else None)
            trees.append(_Tree(number, growth, generator))
        return Trees(
            trees,
            vocabulary=self.vocabulary,
            vocab_size=self.vocab_size,
            sampling=sampling if drawn else None,
            mode=DrawMode.IID if form is None else form.draw,
            more=more,
            draw=self.draw,
        )


def _uniform(generator: torch.Generator) -> Callable[[], float]:
    return lambda: float(torch.rand(1, dtype=torch.float64, generator=generator))
