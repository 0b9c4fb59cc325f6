"""A micro-batch: its tokens, where its documents lie, and what a drafter computes from it.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree);
of packed documents: N = slots of all rows, one after another, C = columns (slots that are attended to), M = queries, L = documents
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.eight_bit import as_states
from drafttrain.core.few_sizes import few_sizes
from drafttrain.core.flops import EARLY, BatchShape
from drafttrain.core.images import PlacedImages
from drafttrain.core.target_rows import (
    AlignedRows,
    RowChoice,
    RowsAsked,
    StoredTargetRows,
    TargetOutput,
    TargetRows,
)


@dataclass(frozen=True)
class Plan:
    """What the host computes about a batch before it is sent to a device, so that no later code waits for the device."""

    shape: BatchShape
    documents: PackedDocuments
    rows: Mapping[RowsAsked, AlignedRows] = field(default_factory=dict)
    slots: Mapping[RowsAsked, ReadSlots] = field(default_factory=dict)
    """The slots that a drafter must compute for these rows."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Plan:
        """Return a copy with changed tensors: moved, pinned."""
        return replace(
            self,
            documents=self.documents.each(change),
            rows={asked: found.each(change) for asked, found in self.rows.items()},
            slots={asked: found.each(change) for asked, found in self.slots.items()},
        )


@dataclass(frozen=True)
class OwnText:
    """The documents of a batch in the tokens of a drafter with its own tokenizer, packed in the same rows.

    S = positions of its rows
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    """They restart at 0 with each document; padding is a document too."""
    slot_BT: Tensor
    """By position of the target: the flat slot b * S + s after which the drafter has read exactly the same text; 0 where none is."""
    readable_BT: Tensor
    """Whether there is one."""
    documents: PackedDocuments

    def each(self, change: Callable[[Tensor], Tensor]) -> OwnText:
        """Return a copy with changed tensors: moved, pinned."""
        return OwnText(
            change(self.tokens_BS),
            change(self.positions_BS),
            change(self.slot_BT),
            change(self.readable_BT),
            self.documents.each(change),
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
    """Number of the record within the optimizer step, equal for all its tokens; -1 is padding."""
    weight_of_step: float
    """Trained positions of all micro-batches of this optimizer step on all ranks."""
    step: int = 0
    """Optimizer step, from 0."""
    num_steps: int = 0
    """Optimizer steps of the whole training, also after a resume; 0: not known, or it has no end."""
    record_ids: Sequence[str] = ()
    """Ids of the records, indexed by their number in `documents_BT` minus the smallest one."""
    drawn_tokens: Sequence[int] = ()
    """Labels of each record that the drafter in training wrote, indexed likewise; 0: the record is as the data has it."""
    target: TargetOutput | None = None
    target_rows: TargetRows | None = None
    num_depths: int = 0
    """Depths to compute, for a drafter that can roll out any number; 0: as many as it trains."""
    plan: Plan | None = None
    """Made from exactly these tokens, masks and documents (`losses.align.planned`)."""
    own: OwnText | None = None
    """Of a drafter with its own tokenizer (`Drafter.with_own_text`)."""
    altered: AlteredText | None = None
    """Of a drafter that is trained on altered texts (`Drafter.notes`)."""
    images: Sequence[PlacedImages] = ()
    """Of the records that have some."""

    @property
    def shape(self) -> BatchShape:
        """How much there is to compute, without padding."""
        return shape_of(self) if self.plan is None else self.plan.shape

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, without padding."""
        return self.shape.positions

    @property
    def packed_documents(self) -> PackedDocuments | None:
        """Where the documents lie; None: there is no plan."""
        return None if self.plan is None else self.plan.documents

    @property
    def seed_BT(self) -> Tensor:
        """A seed for each token, from its step, document and position: random draws do not depend on packing or on a resume."""
        return (self.step * 1_000_003 + self.documents_BT) * (1 << 26) + self.positions_BT

    def each(self, change: Callable[[Tensor], Tensor]) -> DraftBatch:
        """Return a copy with changed tensors (moved, pinned): its own, its plan's and the target's."""
        change = _once(change)
        plan, rows = self.plan, self.target_rows
        return replace(
            self,
            tokens_BT=change(self.tokens_BT),
            loss_mask_BT=change(self.loss_mask_BT),
            positions_BT=change(self.positions_BT),
            documents_BT=change(self.documents_BT),
            plan=plan and plan.each(change),
            own=self.own and self.own.each(change),
            altered=self.altered and self.altered.each(change),
            target=self.target and self.target.each(change),
            target_rows=rows.each(change) if isinstance(rows, StoredTargetRows) else rows,
        )

    def restored(self) -> DraftBatch:
        """Return the batch with the target's states as floating-point numbers; a cache may bring them in eight bits."""
        return replace(self, target=self.target and self.target.each(as_states))

    def to(self, device: Any) -> DraftBatch:
        """Return the batch on `device`."""
        return self.each(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class Late:
    """A micro-batch that is made when its step begins, because it depends on the weights at that step."""

    of_step: Callable[[], Sequence[DraftBatch]]
    number: int

    def made(self) -> DraftBatch:
        """Return the micro-batch."""
        return self.of_step()[self.number]


class Head(Protocol):
    """Turns a drafter's states into logits: `head(states_ND, depth) -> logits_NV`."""

    def __call__(self, states_ND: Tensor, depth: int) -> Tensor: ...


@dataclass(frozen=True)
class DraftOutput:
    """What a drafter computes for a batch: for each depth d = 1..K, states whose row t predicts token t + d + lag.

    States, not logits: a pointwise loss runs the head in chunks, so that the logits of all rows never exist at once. With a
    choice of roots, states_1AD are those of the chosen roots, in the order of `losses.align.chosen_slots`.
    """

    states_BTD: Mapping[int, Tensor]
    head: Head
    lag: int
    depth_weights: Mapping[int, float] = field(default_factory=dict)
    """Factor on the loss of a depth; 1 for a depth that is not listed."""
    extra_loss: Tensor | None = None
    """A loss that the drafter computes itself: a sum over trained positions, added to the sum of loss_N."""
    vocabulary: Tensor | None = None
    """The target's id of each of the drafter's tokens, ascending; None: the vocabularies are the same."""
    beside: tuple[Beside, ...] = ()
    confidence_BT: Mapping[int, Tensor] = field(default_factory=dict)
    """For each depth, the logit of the predicted chance that the token drafted from each state is accepted; empty: no prediction."""
    choice: RowChoice | None = None
    """The rows that are trained; None: all."""
    readable_BT: Tensor | None = None
    """Where there is a state: elsewhere the drafter drafts nothing, rows are not learned, and acceptance is 0. None: everywhere."""

    def logits_BTV(self, depth: int) -> Tensor:
        """Return the logits of one depth at all positions."""
        return self.head(self.states_BTD[depth], depth)


@dataclass(frozen=True)
class Beside:
    """States that are trained beside a drafter's drafts, with a loss whose sum over rows is added to the step's loss.

    If the drafts are compared with the same rows of the target, its head runs once for all.
    """

    drafted: DraftOutput
    loss: Any
    """A `losses.Loss`; None: that of the drafts."""
    target_rows: TargetRows | None
    """None: the loss reads none."""


def shape_of(batch: DraftBatch) -> BatchShape:
    """Return the sizes of a micro-batch. Call it before the batch is moved: on a GPU the host would wait."""
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


def _once(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a change that is applied once to each tensor, so that a shared tensor is not copied twice."""
    done: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = change(tensor)
        return done[id(tensor)]

    return changed


@dataclass(frozen=True)
class _Moved:
    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with changed tensors: moved, pinned."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class PackedDocuments(_Moved):
    """The columns of each document, one document after another, and its queries, which are the last of its columns."""

    bounds: Tensor
    """First column of each document, then the end of the last one; int32, as attention kernels expect."""
    query_bounds: Tensor
    longest: int
    """Upper bound on the columns of a document."""
    on_host: tuple[tuple[slice, slice], ...] | None = None
    """The result of `slices`, if it is known without waiting for a device."""

    @classmethod
    def of(cls, positions_BT: Tensor) -> PackedDocuments:
        """Return the documents of rows whose positions restart at 0 with each; every slot is a column and a query.

        Padding is a document too. On a GPU the host waits.
        """
        starts = (positions_BT.flatten() == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([positions_BT.numel()])]).int()
        return cls(bounds, bounds, longest=positions_BT.shape[1])

    def and_one(self, *, columns: int, queries: int) -> PackedDocuments:
        """Return these documents and another one after them."""
        bounds, query_bounds = (
            torch.cat([old, old[-1:] + more]) for old, more in ((self.bounds, columns), (self.query_bounds, queries))
        )
        return PackedDocuments(bounds, query_bounds, longest=max(self.longest, columns))

    def __post_init__(self) -> None:
        if self.on_host is None and self.bounds.device.type == "cpu":
            object.__setattr__(self, "on_host", self._slices())

    @property
    def slices(self) -> tuple[tuple[slice, slice], ...]:
        """The queries and the columns of each document."""
        return self.on_host or self._slices()

    def _slices(self) -> tuple[tuple[slice, slice], ...]:
        pairs = zip(pairwise(self.query_bounds.tolist()), pairwise(self.bounds.tolist()), strict=True)
        return tuple((slice(*own), slice(*seen)) for own, seen in pairs)


@dataclass(frozen=True)
class ReadSlots(_Moved):
    """The slots that a training step computes: from the first trained slot of each document to its last, and the slots they attend to."""

    column_C: Tensor | None
    """Flat slot b * T + t of every column; None: all slots are."""
    query_M: Tensor | None
    """Index of every query among the columns; None: all columns are queries."""
    documents: PackedDocuments
    num_padding: int = 0
    """Queries at the end that nothing reads."""

    def each(self, change: Callable[[Tensor], Tensor]) -> ReadSlots:
        """Return a copy with changed tensors."""
        return replace(super().each(change), documents=self.documents.each(change))

    @classmethod
    def all(cls, positions_BT: Tensor) -> ReadSlots:
        """Return every slot."""
        return cls(None, None, PackedDocuments.of(positions_BT))

    @classmethod
    def of(cls, trained_R: Tensor, positions_BT: Tensor) -> ReadSlots:
        """Return the slots that the trained positions need; one slot if nothing is trained. Positions are flat."""
        start_N = positions_BT.flatten() == 0
        if not len(trained_R):
            # A process without records runs the same modules as the others, on the smallest input.
            trained_R = trained_R.new_zeros(1)
        number_N = start_N.cumsum(0) - 1
        slot_N = torch.arange(len(number_N), device=number_N.device)
        count, trained_number_R = int(number_N[-1]) + 1, number_N[trained_R]
        first_L = slot_N.new_full((count,), len(slot_N)).scatter_reduce(0, trained_number_R, trained_R, "amin")
        last_L = slot_N.new_full((count,), -1).scatter_reduce(0, trained_number_R, trained_R, "amax")
        seen_N = slot_N <= last_L[number_N]
        looks_C = (slot_N >= first_L[number_N])[seen_N]
        if bool(looks_C.all() & seen_N.all()):
            return cls.all(positions_BT)
        number_C = number_N[seen_N]
        columns_L = number_C.bincount(minlength=count)
        queries_L = number_C[looks_C].bincount(minlength=count)
        documents = PackedDocuments(
            _bounds(columns_L[columns_L > 0]), _bounds(queries_L[columns_L > 0]), longest=positions_BT.shape[1]
        )
        return cls(seen_N.nonzero()[:, 0], looks_C.nonzero()[:, 0], documents)

    def padded(self, num_slots: int) -> ReadSlots:
        """Return these slots and a document of padding, so that the numbers of columns and of queries are few sizes.

        Args:
            num_slots: Slots of the batch, B * T.
        """
        bounds = self.documents.bounds
        column_C = torch.arange(num_slots, device=bounds.device) if self.column_C is None else self.column_C
        query_M = torch.arange(len(column_C), device=bounds.device) if self.query_M is None else self.query_M
        more_queries = few_sizes(len(query_M) + 1) - len(query_M)
        # A document has at least as many columns as queries.
        more_columns = few_sizes(len(column_C) + more_queries) - len(column_C)
        new_M = torch.arange(more_columns - more_queries, more_columns, device=bounds.device) + len(column_C)
        return ReadSlots(
            torch.cat([column_C, column_C.new_zeros(more_columns)]),
            torch.cat([query_M, new_M]),
            self.documents.and_one(columns=more_columns, queries=more_queries),
            num_padding=more_queries,
        )

    def columns(self, values_BT: Tensor) -> Tensor:
        """Return the values at the columns as one row, values_1C."""
        values_N = values_BT.flatten(0, 1)
        return (values_N if self.column_C is None else values_N.index_select(0, self.column_C))[None]

    def queries(self, values_1C: Tensor) -> Tensor:
        """Return the values at the queries, values_1M."""
        return values_1C if self.query_M is None else values_1C.index_select(1, self.query_M)

    def spread(self, values_1M: Tensor, like_BT: Tensor) -> Tensor:
        """Return values_BT, 0 at slots that are not computed."""
        if self.column_C is None:
            return values_1M[0].unflatten(0, like_BT.shape)
        slot_M = self.column_C if self.query_M is None else self.column_C[self.query_M]
        values_N = values_1M.new_zeros(like_BT.numel(), *values_1M.shape[2:])
        read = len(slot_M) - self.num_padding
        return values_N.index_copy(0, slot_M[:read], values_1M[0, :read]).unflatten(0, like_BT.shape)


def _bounds(sizes_L: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes_L.cumsum(0), (1, 0)).int()
