"""Proposals of a drafter, and the verdicts on them.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from drafttrain.core.tree_growth import TreeForm


class Exactness(Enum):
    """What an acceptance rule preserves of the target's output."""

    DISTRIBUTION = "distribution"
    GREEDY = "greedy"
    LOSSY = "lossy"


class NodeKind(Enum):
    """How a draft token was chosen; values are stored in `Proposal.kinds_N`."""

    ROOT = 0
    SAMPLED = 1
    FIXED = 2


class DrawMode(Enum):
    """How the SAMPLED children of one parent were drawn."""

    IID = "iid"
    WITHOUT_REPLACEMENT = "without_replacement"


@dataclass
class Context:
    """One sequence being decoded. The engine appends to `tokens`; proposers and policies only read."""

    id: str
    tokens: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Budget:
    """How much may be drafted in one round, without the root: a chain if `width` is 1, else a tree."""

    nodes: int
    depth: int
    width: int = 1
    """Most children of a node."""
    states: bool = False
    """The policy reads `DraftStep.hidden_D`, which takes the drafter some time."""
    form: TreeForm | None = None
    """How a tree grows; None: its nodes are the drafter's likeliest ones."""

    def within(self, depth: int) -> Budget:
        """Return the budget limited to a depth, and to the nodes of a full tree of that depth and width."""
        depth = min(self.depth, depth)
        full = sum(self.width**level for level in range(1, depth + 1))
        return replace(self, nodes=min(self.nodes, full), depth=depth)


class More(Enum):
    """An answer of a length policy between yes and no."""

    LAST = "last"
    """Draft this token, whose distribution is already computed, and stop: the next distribution would cost a forward."""


@dataclass(frozen=True)
class DraftStep:
    """What a length policy may use to decide. It must not see the token that is not drafted yet (the filtration rule)."""

    sequence: int
    depth: int
    logits_V: Tensor
    """The drafter's logits of the draft token that would be next."""
    hidden_D: Tensor | None = None
    """The drafter's last hidden state at the newest token of the branch."""
    token: int | None = None
    """The newest token of the branch: at depth 1 the root, then a draft token."""
    confidence: Tensor | None = None
    """The logit of the chance that the next draft token is accepted, as the drafter predicts it before the token is drawn."""

    @cached_property
    def q_row_V(self) -> Tensor:
        """The drafter's distribution at temperature 1, whatever the sampling: a one-hot row would carry no information."""
        return self.logits_V.float().softmax(dim=-1)


@dataclass(frozen=True)
class LayerState:
    """States from which the target continues at block `layer`, instead of running its first blocks again."""

    layer: int
    hidden_ND: Tensor
    passed_ND: Mapping[int, Tensor] = field(default_factory=dict)
    """States on the way that were asked for, by the block that they enter."""


@dataclass(frozen=True)
class RowsBeside:
    """Rows that the target's call reads after the nodes of a proposal. Nothing verifies or keeps them; `observe` gets their logits."""

    tokens: Sequence[int]
    parents: Sequence[int]
    """Each row follows a node, or an earlier row: its number plus that of the nodes."""


@dataclass(frozen=True)
class Proposal:
    """A tree of draft tokens; node 0 is the root, the last committed token. parents_N[i] < i, parents_N[0] = -1.

    Siblings are listed in the order in which they were drawn.
    """

    tokens_N: Tensor
    parents_N: Tensor
    depths_N: Tensor
    kinds_N: Tensor
    """NodeKind values. SAMPLED: drawn from a row of q; FIXED: deterministic given the committed text."""
    q_rows_RV: Tensor | None = None
    """Distributions over the TARGET's vocabulary from which SAMPLED children were drawn."""
    q_row_N: Tensor | None = None
    """By node, the row of q_rows_RV from which its CHILDREN were drawn; -1: no sampled children."""
    draw: DrawMode = DrawMode.IID
    resume: LayerState | None = None
    beside: RowsBeside | None = None
    """What the call reads after the nodes; None: nothing."""
    confidence: Sequence[float] | None = None
    """The drafter's probability of each draft token of a chain, for rules that trust it; None: not known."""
    refined: int | None = None
    """Rounds that have refined this chain since one was accepted whole; None: it is no iterate of Jacobi decoding."""
    unread_leaf: bool = False
    """The last node was drafted while the target's call ran, so the call does not read it. It is verified by the row of its parent;
    where it is accepted, the round ends without a token of the target's own."""

    @property
    def num_read(self) -> int:
        """Nodes that the target's call reads."""
        return len(self.tokens_N) - self.unread_leaf

    def read(self) -> tuple[list[int], list[int]]:
        """Return (tokens, parents) of the rows of the target's call: the nodes that it reads, then those beside them."""
        nodes = self.tokens_N[: self.num_read].tolist(), self.parents_N[: self.num_read].tolist()
        if self.beside is None:
            return nodes
        assert not self.unread_leaf, "the rows would have other numbers"
        return nodes[0] + list(self.beside.tokens), nodes[1] + list(self.beside.parents)

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens: all nodes except the root."""
        return len(self.tokens_N) - 1

    def first(self, count: int) -> Proposal:
        """Return a chain with its first `count` draft tokens only."""
        if count == self.num_draft_tokens:
            return self
        assert self.resume is None, "its states would have to be cut too"
        assert not self.unread_leaf, "the leaf would be another one"
        assert self.beside is None, "its rows would have to be cut too"
        kind = NodeKind.FIXED if self.q_rows_RV is None or count == 0 else NodeKind.SAMPLED
        rows_RV = None if self.q_rows_RV is None else self.q_rows_RV[:count]
        return chain(self.tokens_N[: count + 1].tolist(), kind=kind, q_rows_RV=rows_RV)


def chain(tokens: Sequence[int], *, kind: NodeKind, q_rows_RV: Tensor | None = None) -> Proposal:
    """Return a chain: the root, then the draft tokens.

    Args:
        tokens: The root, then the draft tokens.
        q_rows_RV: For SAMPLED: the distribution of each draft token, in order.
    """
    import torch

    count = len(tokens)
    sampled = kind is NodeKind.SAMPLED
    return Proposal(
        tokens_N=torch.tensor(tokens),
        parents_N=torch.arange(-1, count - 1),
        depths_N=torch.arange(count),
        kinds_N=torch.tensor([NodeKind.ROOT.value] + [kind.value] * (count - 1)),
        q_rows_RV=q_rows_RV if sampled else None,
        q_row_N=torch.tensor([*range(count - 1), -1]) if sampled else None,
    )


def fixed_chain(root: int, drafted: Sequence[int]) -> Proposal:
    """Return a FIXED chain after the root."""
    return chain([root, *drafted], kind=NodeKind.FIXED)


def fixed_tree(root: int, nodes: Sequence[tuple[int, int]]) -> Proposal:
    """Return a FIXED tree under the root.

    Args:
        nodes: (token, parent) of nodes 1, 2, ... A parent has a smaller number; 0 is the root. Siblings in draft order.
    """
    import torch

    depths = [0]
    for number, (_, parent) in enumerate(nodes, start=1):
        assert 0 <= parent < number, "a node comes after its parent"
        depths.append(depths[parent] + 1)
    return Proposal(
        tokens_N=torch.tensor([root, *(token for token, _ in nodes)]),
        parents_N=torch.tensor([-1, *(parent for _, parent in nodes)]),
        depths_N=torch.tensor(depths),
        kinds_N=torch.tensor([NodeKind.ROOT.value] + [NodeKind.FIXED.value] * len(nodes)),
    )


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one proposal."""

    path: Sequence[int]
    """Accepted nodes from the root (always 0) down."""
    tokens: Sequence[int]
    """Emitted tokens: the accepted draft tokens, then the target's own (absent if cut by EOS, or after an unread leaf)."""
    reason: str
    """reject, leaf, eos or length."""
    proposal: Proposal
    """What was verified. It may have nodes after those of the proposer, if that was one part of a fused proposal."""
    tested: Sequence[tuple[int, bool]] = ()
    """By node of the path that has children: how many of them were rejected, and whether the next one was accepted."""

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that were verified."""
        return self.proposal.num_draft_tokens

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node that was drafted."""
        return int(self.proposal.depths_N.max())

    @property
    def num_accepted(self) -> int:
        """Accepted draft tokens."""
        return len(self.path) - 1
