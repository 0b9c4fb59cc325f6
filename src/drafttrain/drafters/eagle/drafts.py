"""The draft of one sequence in one round: a chain, or EAGLE-2's dynamic tree.

Both take the drafter's distribution after each frontier node, and return which nodes to read next.

R = the drafter's vocabulary, F = nodes of the frontier, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.core.probability import over_target_vocabulary
from drafttrain.core.proposals import Budget, DraftStep, More, NodeKind, Proposal, chain
from drafttrain.core.texts import Sampling
from drafttrain.drafters.dynamic_tree import DynamicTree
from drafttrain.drafters.next_tokens import next_tokens


@dataclass(frozen=True)
class DraftNode:
    """A draft token whose children will be drafted: the layer must read it."""

    token: int
    depth: int
    parent: int
    """Number of its parent in the order in which the draft's nodes were read; -1: the committed text."""
    state_D: Tensor
    """The layer's state that the token was drafted from."""


class Draft(Protocol):
    """One sequence's draft of a round."""

    frontier: list[DraftNode]
    """Nodes to read next; empty: the draft is complete."""

    def proposal(self) -> Proposal:
        """Return the draft."""
        ...


class DraftChain:
    """A chain: each token is drawn from the drafter's distribution, or is its argmax."""

    def __init__(
        self,
        root: int,
        budget: Budget,
        *,
        sequence: int,
        vocabulary_R: Tensor,
        vocab_size: int,
        generator: torch.Generator,
        more: Callable[[DraftStep], bool | More],
    ) -> None:
        self.generator = generator
        self.frontier: list[DraftNode] = []
        self._tokens = [root]
        self._q_rows: list[Tensor] = []
        self._limit = min(budget.nodes, budget.depth)
        self._sequence = sequence
        self._vocabulary_R = vocabulary_R
        self._vocab_size = vocab_size
        self._more = more

    def wants(self, logits_R: Tensor, state_D: Tensor) -> bool:
        """Return whether the length policy wants a token from this distribution. If so, call `take`."""
        self.frontier = []
        self._state_D = state_D
        self._answer = self._more(DraftStep(self._sequence, len(self._tokens), logits_R, state_D, self._tokens[-1]))
        return bool(self._answer)

    def take(self, token: int, q_R: Tensor | None) -> None:
        """Draft a token.

        Args:
            token: The target's id.
            q_R: The distribution it was drawn from; None: it is the argmax.
        """
        depth = len(self._tokens)
        self._tokens.append(token)
        if q_R is not None:
            self._q_rows.append(q_R)
        if depth < self._limit and self._answer is not More.LAST:
            self.frontier = [DraftNode(token, depth, depth - 2, self._state_D)]

    def proposal(self) -> Proposal:
        """Return the chain. Drawn tokens carry their distributions over the target's vocabulary."""
        if not self._q_rows:
            return chain(self._tokens, kind=NodeKind.FIXED)
        q_rows_RV = over_target_vocabulary(torch.stack(self._q_rows), self._vocabulary_R, size=self._vocab_size)
        return chain(self._tokens, kind=NodeKind.SAMPLED, q_rows_RV=q_rows_RV)


class DraftTree:
    """EAGLE-2's dynamic tree: level by level, the likeliest nodes are read. Its nodes are FIXED at every temperature.

    Source: Li et al. 2024, EAGLE-2, arXiv 2406.16858, 4.
    """

    def __init__(
        self,
        root: int,
        budget: Budget,
        *,
        sequence: int,
        vocabulary_R: Tensor,
        more: Callable[[DraftStep], bool | More],
    ) -> None:
        self.frontier: list[DraftNode] = []
        self._tree = DynamicTree(root, budget)
        self._sequence = sequence
        self._vocabulary_R = vocabulary_R
        self._more = more
        self._read = {0: -1}
        """By node of the tree, its number in the order of reading; -1 for the root, which is committed text."""

    def grow(self, logits_FR: Tensor, states_FD: Tensor) -> None:
        """Add the children of frontier nodes that the length policy allows, and choose the next frontier."""
        tree, row_of = self._tree, {node: row for row, node in enumerate(self._tree.frontier)}
        logits_FR = logits_FR[:, : len(self._vocabulary_R)]
        rows = logits_FR.unbind()
        states = states_FD.unbind()
        expand = [
            bool(self._more(DraftStep(self._sequence, tree.depth + 1, rows[row], states[row], self._token(node))))
            for node, row in row_of.items()
        ]
        wide = torch.promote_types(logits_FR.dtype, torch.float32)
        tree.grow(logits_FR.log_softmax(dim=-1, dtype=wide), expand)
        self.frontier = [
            DraftNode(self._token(node), tree.depth, self._read[tree.parents[node]], states[row_of[tree.parents[node]]])
            for node in tree.frontier
        ]
        self._read |= {node: len(self._read) - 1 + place for place, node in enumerate(tree.frontier)}

    def proposal(self) -> Proposal:
        """Return the likeliest nodes as a tree under the root."""
        kept = self._tree.proposal()
        kept.tokens_N[1:] = self._vocabulary_R[kept.tokens_N[1:]]
        return kept

    def _token(self, node: int) -> int:
        """Return the target's id of a node's token."""
        token = self._tree.tokens[node]
        return token if node == 0 else int(self._vocabulary_R[token])


def grow_chains(
    chains: Sequence[DraftChain],
    logits_NR: Tensor,
    states_ND: Tensor,
    *,
    ids: Sequence[int],
    sampling: Sampling,
    greedy: bool,
) -> None:
    """Draft one more token in every chain whose length policy wants one. The device is read once.

    Args:
        logits_NR: Of each chain, after its last token.
        ids: The target's id of each of the drafter's tokens.
        greedy: Take the argmax at every temperature.
    """
    logits_NR = logits_NR[:, : len(ids)]
    wanting = [
        (draft, logits_R)
        for draft, logits_R, state_D in zip(chains, logits_NR, states_ND, strict=True)
        if draft.wants(logits_R, state_D)
    ]
    places, q_rows = next_tokens(
        [logits_R for _, logits_R in wanting],
        sampling,
        [draft.generator for draft, _ in wanting],
        fixed=greedy or sampling.temperature == 0,
    )
    for (draft, _), place, q_R in zip(wanting, places, q_rows, strict=True):
        draft.take(ids[place], q_R)
