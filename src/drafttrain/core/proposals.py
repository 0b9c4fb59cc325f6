"""Proposals of a drafter and the verdicts on them.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Exactness(Enum):
    """What an acceptance rule keeps of the target's output."""

    DISTRIBUTION = "distribution"
    GREEDY = "greedy"
    LOSSY = "lossy"


class NodeKind(Enum):
    """How a draft token came about; values are stored in `Proposal.kinds_N`."""

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
    """How much may be drafted in one round, the root not counted: a chain where `width` is 1, else a tree."""

    nodes: int
    depth: int
    width: int = 1
    """Children of a node at most."""
    states: bool = False
    """The policy reads `DraftStep.hidden_D`, which costs a drafter some time to hand out."""

    def within(self, depth: int) -> Budget:
        """Return the budget cut to a depth; the nodes to what a tree of this depth and width can hold."""
        depth = min(self.depth, depth)
        full = sum(self.width**level for level in range(1, depth + 1))
        return Budget(min(self.nodes, full), depth, self.width, self.states)


class More(Enum):
    """An answer of a stopping rule between yes and no."""

    LAST = "last"
    """Draft this token, whose law is there already, and stop without reading it: the next law costs a forward, this one none."""


@dataclass(frozen=True)
class DraftStep:
    """What a stopping rule may look at. The token is there only if it is already in the tree (the filtration rule)."""

    sequence: int
    depth: int
    logits_V: Tensor
    """The drafter's logits of the draft token that would be next."""
    hidden_D: Tensor | None = None
    """The drafter's last hidden state where it read the newest token of the branch."""
    token: int | None = None
    """That newest token: at depth 1 the root, then a draft token that is in the tree."""

    @cached_property
    def q_row_V(self) -> Tensor:
        """The drafter's law at temperature 1, whatever the sampling: at temperature 0 a one-hot law would say nothing."""
        return self.logits_V.float().softmax(dim=-1)


@dataclass(frozen=True)
class LayerState:
    """The target continues from block `layer` with these rows instead of running its first blocks again."""

    layer: int
    hidden_ND: Tensor


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
    """Laws over the TARGET's vocabulary that SAMPLED children were drawn from."""
    q_row_N: Tensor | None = None
    """By node, the row of q_rows_RV its CHILDREN were drawn from; -1: no sampled children."""
    draw: DrawMode = DrawMode.IID
    resume: LayerState | None = None

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens: all nodes but the root."""
        return len(self.tokens_N) - 1


def chain(tokens: Sequence[int], *, kind: NodeKind, q_rows_RV: Tensor | None = None) -> Proposal:
    """Return the chain proposal of a root and the draft tokens behind it.

    Args:
        tokens: The root, then the draft tokens.
        q_rows_RV: SAMPLED: the law of each draft token, in order.
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
    """Return a FIXED chain behind the root."""
    return chain([root, *drafted], kind=NodeKind.FIXED)


def fixed_tree(root: int, nodes: Sequence[tuple[int, int]]) -> Proposal:
    """Return a FIXED tree under the root.

    Args:
        nodes: (token, parent) of node 1, 2, ...; the parent is a smaller node number, 0 the root. Siblings in draft order.
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
    """What became of one proposal."""

    path: Sequence[int]
    """Accepted nodes from the root (always 0) down."""
    tokens: Sequence[int]
    """Tokens emitted: the accepted draft tokens, then the target's own (absent when cut by EOS or length)."""
    num_draft_tokens: int
    max_depth: int
    """Depth of the deepest node that was drafted."""
    reason: str
    """reject, leaf, eos or length."""

    @property
    def num_accepted(self) -> int:
        """Draft tokens kept."""
        return len(self.path) - 1
