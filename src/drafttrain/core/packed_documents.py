"""Where the documents of packed rows lie, and which of their slots a training reads.

B = sequences, T = positions, N = slots of all rows, one after another, C = slots that are looked at, M = those that look,
L = documents
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Moved:
    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same of changed tensors: moved, pinned."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class PackedDocuments(_Moved):
    """The columns of each document, one document after another, and its queries, which are at the last of them."""

    bounds: Tensor
    """Where the columns of each document begin, and where the last ones end: int32, as kernels want it."""
    query_bounds: Tensor
    longest: int
    """No document has more columns."""
    on_host: tuple[tuple[slice, slice], ...] | None = None
    """What `slices` returns, where it is known without waiting for a device."""

    @classmethod
    def of(cls, positions_BT: Tensor) -> PackedDocuments:
        """Return the documents of rows whose positions restart at 0 with each; every slot is a column and a query.

        Padding is a document too. The host waits for a device that is no CPU.
        """
        starts = (positions_BT.flatten() == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([positions_BT.numel()])]).int()
        return cls(bounds, bounds, longest=positions_BT.shape[1])

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
    """The slots that a training reads: of each document from its first trained one to its last, and what these look at."""

    column_C: Tensor | None
    """Flat slot b * T + t of every column; None: all slots are."""
    query_M: Tensor | None
    """Place among the columns of every query; None: all columns are."""
    documents: PackedDocuments

    def each(self, change: Callable[[Tensor], Tensor]) -> ReadSlots:
        """Return the same of changed tensors."""
        return replace(super().each(change), documents=self.documents.each(change))

    @classmethod
    def all(cls, positions_BT: Tensor) -> ReadSlots:
        """Return every slot."""
        return cls(None, None, PackedDocuments.of(positions_BT))

    @classmethod
    def of(cls, trained_R: Tensor, positions_BT: Tensor) -> ReadSlots:
        """Return what the trained slots need, given as flat positions; where there are none, one slot."""
        start_N = positions_BT.flatten() == 0
        if not len(trained_R):
            # A process without records runs the same modules as the others, on as little as they take.
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

    def columns(self, values_BT: Tensor) -> Tensor:
        """Return the values of the columns, as one row: values_1C."""
        values_N = values_BT.flatten(0, 1)
        return (values_N if self.column_C is None else values_N.index_select(0, self.column_C))[None]

    def queries(self, values_1C: Tensor) -> Tensor:
        """Return values_1M."""
        return values_1C if self.query_M is None else values_1C.index_select(1, self.query_M)

    def spread(self, values_1M: Tensor, like_BT: Tensor) -> Tensor:
        """Return values_BT with 0 where nothing is read."""
        if self.column_C is None:
            return values_1M[0].unflatten(0, like_BT.shape)
        slot_M = self.column_C if self.query_M is None else self.column_C[self.query_M]
        values_N = values_1M.new_zeros(like_BT.numel(), *values_1M.shape[2:])
        return values_N.index_copy(0, slot_M, values_1M[0]).unflatten(0, like_BT.shape)


def _bounds(sizes_L: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes_L.cumsum(0), (1, 0)).int()
