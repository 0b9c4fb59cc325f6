"""A micro-batch, and what a drafter computes from it.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from drafttrain.core.flops import EARLY, BatchShape

if TYPE_CHECKING:
    from torch import Tensor

    from drafttrain.core.packed_documents import PackedDocuments, ReadSlots

from drafttrain.core.target_rows import AlignedRows, RowsAsked, StoredTargetRows, TargetOutput, TargetRows


def _once(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a change that gives the same tensor the same result: what two hold is not copied twice."""
    done: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = change(tensor)
        return done[id(tensor)]

    return changed


@dataclass(frozen=True)
class Plan:
    """What the host knows of a batch before it is sent to a device, so that nobody has to ask the device and wait."""

    shape: BatchShape
    documents: PackedDocuments
    rows: Mapping[RowsAsked, AlignedRows] = field(default_factory=dict)
    slots: Mapping[RowsAsked, ReadSlots] = field(default_factory=dict)
    """What these rows need of a drafter."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Plan:
        """Return the same of changed tensors: moved, pinned."""
        return replace(
            self,
            documents=self.documents.each(change),
            rows={asked: found.each(change) for asked, found in self.rows.items()},
            slots={asked: found.each(change) for asked, found in self.slots.items()},
        )


@dataclass(frozen=True)
class DraftBatch:
    """A micro-batch of packed records.

    A row holds several documents; `positions_BT` restarts at 0 with each, and attention must not cross them.
    """

    tokens_BT: Tensor
    loss_mask_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    """Number of the record within the optimiser step, equal for all its tokens; -1 is padding."""
    weight_of_step: float
    """Trained positions of all micro-batches of this optimiser step on all ranks."""
    step: int = 0
    """Optimiser step, from 0."""
    record_ids: Sequence[str] = ()
    """Ids of the records, by their number in `documents_BT` less the smallest one."""
    target: TargetOutput | None = None
    target_rows: TargetRows | None = None
    num_depths: int = 0
    """Depths that are asked of a drafter that can roll out any number; 0: as many as it trains."""
    plan: Plan | None = None
    """Of exactly these tokens, masks and documents (`losses.align.planned`)."""

    @property
    def shape(self) -> BatchShape:
        """How much there is to compute, padding left out."""
        return shape_of(self) if self.plan is None else self.plan.shape

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, padding left out."""
        return self.shape.positions

    @property
    def packed_documents(self) -> PackedDocuments | None:
        """Where they lie, if the plan says so."""
        return None if self.plan is None else self.plan.documents

    @property
    def seed_BT(self) -> Tensor:
        """A number of each token that step, document and position give, for draws that packing and resuming must not change."""
        return (self.step * 1_000_003 + self.documents_BT) * (1 << 26) + self.positions_BT

    def each(self, change: Callable[[Tensor], Tensor]) -> DraftBatch:
        """Return the batch of changed tensors (moved, pinned): its own, its plan's, and what it holds of the target."""
        change = _once(change)
        plan, rows = self.plan, self.target_rows
        return replace(
            self,
            tokens_BT=change(self.tokens_BT),
            loss_mask_BT=change(self.loss_mask_BT),
            positions_BT=change(self.positions_BT),
            documents_BT=change(self.documents_BT),
            plan=plan and plan.each(change),
            target=self.target and self.target.each(change),
            target_rows=rows.each(change) if isinstance(rows, StoredTargetRows) else rows,
        )

    def to(self, device: Any) -> DraftBatch:
        """Return the batch on `device`."""
        return self.each(lambda tensor: tensor.to(device))


class Head(Protocol):
    """Turns a drafter's states into logits: `head(states_ND, depth) -> logits_NV`."""

    def __call__(self, states_ND: Tensor, depth: int) -> Tensor: ...


@dataclass(frozen=True)
class DraftOutput:
    """What a drafter says of a batch: by depth d = 1..K, states whose row t is the law of token t + d + lag.

    States, not logits: a pointwise loss runs the head in chunks, so that no logits tensor need exist.
    """

    states_BTD: Mapping[int, Tensor]
    head: Head
    lag: int
    depth_weights: Mapping[int, float] = field(default_factory=dict)
    """Factor on the loss of a depth; 1 where it is not named."""
    extra_loss: Tensor | None = None
    """What the drafter adds to the loss of the step by itself: a sum over trained positions, like the sum of loss_N."""
    vocabulary: Tensor | None = None
    """The target's id of each of the drafter's tokens, ascending; None: the vocabularies are the same."""
    beside: Beside | None = None

    def logits_BTV(self, depth: int) -> Tensor:
        """Return the whole logits of one depth."""
        return self.head(self.states_BTD[depth], depth)


@dataclass(frozen=True)
class Beside:
    """States that are trained beside a drafter's drafts, by a loss of their own; the loss of the step has its sum over rows.

    Where the drafts are compared with the same rows of the target, its head runs once for both.
    """

    drafted: DraftOutput
    loss: Any
    """A `losses.Loss`."""
    target_rows: TargetRows


def shape_of(batch: DraftBatch) -> BatchShape:
    """Count a micro-batch: on its device, which a GPU is waited for, so before it is moved there."""
    read_BT = batch.documents_BT >= 0
    positions_N = batch.positions_BT[read_BT]
    labels_N = batch.positions_BT[read_BT & batch.loss_mask_BT]
    early = labels_N[labels_N < EARLY].bincount(minlength=EARLY).tolist()
    pairs = int(positions_N.sum()) + len(positions_N)
    return BatchShape(len(positions_N), pairs, len(labels_N), tuple(early), tuple(_spans(batch)))


def _spans(batch: DraftBatch) -> Iterable[tuple[int, int]]:
    chosen_BT = batch.loss_mask_BT & (batch.documents_BT >= 0) & (batch.positions_BT >= 2)
    position_N, (documents, place_N) = (
        batch.positions_BT[chosen_BT],
        batch.documents_BT[chosen_BT].unique(return_inverse=True),
    )
    empty = documents.new_zeros(len(documents))
    first, last = (
        empty.scatter_reduce(0, place_N, position_N, how, include_self=False).tolist() for how in ("amin", "amax")
    )
    return zip(first, last, strict=True)
