"""What is read from the target for a batch: which states and logits are needed, and their rows.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree)

Indices. `hidden_BTD[i]`, i = 0..n, is the residual stream ENTERING block i (0 the embedding, n after the last block, BEFORE
the final norm); `final_BTD` is the state after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class TargetNeeds:
    """What a drafter or a loss needs from the target; nothing else is computed or stored."""

    logits: bool = False
    hidden: tuple[int, ...] = ()
    """States by the block that they enter; n or -1: after the last block, before the final norm."""
    final: bool = False

    def __or__(self, other: TargetNeeds) -> TargetNeeds:
        hidden = tuple(sorted({*self.hidden, *other.hidden}))
        return TargetNeeds(self.logits or other.logits, hidden, self.final or other.final)


@dataclass(frozen=True)
class TargetOutput:
    """The frozen target's outputs for a batch: only those that were requested."""

    logits_BTV: Tensor | None = None
    hidden_BTD: Mapping[int, Tensor] = field(default_factory=dict)
    final_BTD: Tensor | None = None

    def has(self, needs: TargetNeeds) -> bool:
        """Return whether everything that is needed is here."""
        return (
            (self.logits_BTV is not None or not needs.logits)
            and (self.final_BTD is not None or not needs.final)
            and set(needs.hidden) <= set(self.hidden_BTD)
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> TargetOutput:
        """Return a copy with changed tensors: moved, pinned."""
        return TargetOutput(
            logits_BTV=None if self.logits_BTV is None else change(self.logits_BTV),
            hidden_BTD={index: change(state) for index, state in self.hidden_BTD.items()},
            final_BTD=None if self.final_BTD is None else change(self.final_BTD),
        )

    def to(self, device: Any) -> TargetOutput:
        """Return a copy on `device`."""
        return self.each(lambda tensor: tensor.to(device))


class TargetRows(Protocol):
    """The target's distribution at chosen positions of a batch, from a live model or from a cache."""

    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV (or log-probabilities) of the token AFTER each flat position b * T + t."""
        ...


@dataclass(frozen=True)
class NamedRows:
    """Rows of a distribution, with known probabilities for K tokens each."""

    ids_NK: Tensor
    """-1 where a row has fewer tokens."""
    log_probs_NK: Tensor
    """-inf there."""

    @property
    def tail_N(self) -> Tensor:
        """The total probability of all other tokens."""
        return (1 - self.log_probs_NK.double().exp().sum(dim=-1)).clamp_min(0).to(self.log_probs_NK.dtype)


@dataclass(frozen=True)
class PartOfRows:
    """Rows of a distribution over a part of the vocabulary, and what is known about all tokens."""

    logits_NR: Tensor
    likeliest_N: Tensor
    """The likeliest token of the whole row."""
    log_total_N: Tensor
    """Logarithm of the sum over all tokens of exp(logit)."""


@runtime_checkable
class PartialTargetRows(Protocol):
    """A distribution whose logits can be computed for some tokens only."""

    @property
    def num_tokens(self) -> int:
        """The tokens that `log_total_N` sums over: ids below this number."""
        ...

    def of_tokens(self, index_N: Tensor, ids_R: Tensor) -> PartOfRows:
        """Return the logits of some tokens AFTER each flat position b * T + t."""
        ...


@runtime_checkable
class NamedTargetRows(Protocol):
    """A distribution with known probabilities for some tokens only, as serving logs store it."""

    def named(self, index_N: Tensor) -> NamedRows:
        """Return what is known about the distribution of the token AFTER each flat position b * T + t."""
        ...


@runtime_checkable
class StoredTargetRows(Protocol):
    """A distribution that is stored in its batch and moves with it."""

    def each(self, change: Callable[[Tensor], Tensor]) -> TargetRows:
        """Return a copy with changed tensors: moved, pinned."""
        ...


@dataclass(frozen=True)
class RowIndex:
    """Where loss rows come from; the same order as the rows."""

    sequence_N: Tensor
    depth_N: Tensor
    block_N: Tensor
    """Rows of one block are the successive depths of one draft: of one root, or of one window of a chain."""
    step: int = 0
    deepest: int = 0
    """Upper bound on the depth, known without waiting for the device; 0: not known."""
    learnable_N: Tensor | None = None
    """Rows that count; None: all. The others have loss 0 and are left out of means and blocks."""

    def each(self, change: Callable[[Tensor], Tensor]) -> RowIndex:
        """Return a copy with changed tensors: moved, pinned, sliced."""
        return replace(
            self,
            sequence_N=change(self.sequence_N),
            depth_N=change(self.depth_N),
            block_N=change(self.block_N),
            learnable_N=None if self.learnable_N is None else change(self.learnable_N),
        )

    def part(self, chosen: slice) -> RowIndex:
        """Return the index of some rows."""
        return self.each(lambda tensor: tensor[chosen])


class RowChoice(Protocol):
    """Which rows a drafter trains, if it does not train all of them. Equal choices are equal keys."""

    def chosen(self, trained: Mapping[int, Tensor], document_R: Tensor, seed_R: Tensor) -> ChosenRows:
        """Choose rows.

        Args:
            trained: By depth, trained_R: whether the row of each flat slot b * T + t has a label that is trained.
            document_R: As `DraftBatch.documents_BT`.
            seed_R: A seed for each slot, another one in every step.
        """
        ...


@dataclass(frozen=True)
class ChosenRows:
    """The rows that a step trains."""

    trained: Mapping[int, Tensor]
    """By depth, trained_R."""
    scale_R: Tensor | None = None
    """Factor on the loss of the rows of each slot; None: 1."""
    states: Literal["slots", "roots", "rows"] = "slots"
    """Which states of a depth the drafter computes: of all slots; of all slots with a row of any depth; of the rows of this depth."""


@dataclass(frozen=True)
class RowsAsked:
    """Which rows of a batch are requested: what `losses.align` needs to know about a drafter and a loss."""

    depths: tuple[int, ...]
    lag: int
    block_length: int = 1
    """Rows of a drafter of depth 1 that form one block; 1 for all other drafters."""
    choice: RowChoice | None = None
    """None: all rows whose label is trained."""

    def __post_init__(self) -> None:
        if len(self.depths) > 1 or self.choice is not None:
            object.__setattr__(self, "block_length", 1)


@dataclass(frozen=True)
class AlignedRows:
    """The N trained rows of a batch, depth by depth: where the drafter, the target and the label of each are."""

    drafter_N: Tensor
    """Index of the drafter's state among those of its depth: the flat position b * T + t; with a choice of rows, see
    `ChosenRows.states`."""
    target_N: Tensor
    """Flat position of the target's state that predicts the same token."""
    tokens_N: Tensor
    """The label."""
    seed_N: Tensor
    """A seed for the row that does not depend on its micro-batch."""
    index: RowIndex
    counts: Mapping[int, int]
    """Number of rows of each depth, in the order of the rows."""
    read_U: Tensor
    """Every flat position in `target_N` once, ascending."""
    targets_on_host: Tensor
    """`target_N` on the CPU, wherever the batch is: pieces are planned from it without waiting for the device."""
    read_on_host: Tensor
    """`read_U` on the CPU."""
    slots_A: Tensor | None = None
    """With states of roots: the flat slots that the drafter computes, ascending, at least one."""
    scale_N: Tensor | None = None
    """Factor on each row's loss; None: 1."""

    def each(self, change: Callable[[Tensor], Tensor]) -> AlignedRows:
        """Return a copy with changed tensors: moved, pinned."""
        return replace(
            self,
            drafter_N=change(self.drafter_N),
            target_N=change(self.target_N),
            tokens_N=change(self.tokens_N),
            seed_N=change(self.seed_N),
            index=self.index.each(change),
            read_U=change(self.read_U),
            slots_A=None if self.slots_A is None else change(self.slots_A),
            scale_N=None if self.scale_N is None else change(self.scale_N),
        )
