"""Where the blocks of a pass stand: the slot of each root, and the part of its document before it, which is its context.

A = blocks, B = slots of a block, N = slots of all rows of a batch, one after another
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.few_sizes import few_sizes


@dataclass(frozen=True)
class Span:
    """Blocks of one document, and the columns that end where the last of them begins."""

    blocks: slice
    columns: slice


@dataclass(frozen=True)
class Blocks:
    """The roots of a pass, in rising order. A block's context is its document before its root; the root is its first slot."""

    slots_A: Tensor
    """Flat slot b * T + t of each root, on the device of the batch."""
    spans: tuple[Span, ...]
    """By document, known on the host: the blocks of a document are consecutive."""
    on_host: Tensor
    """`slots_A` on the CPU."""

    @classmethod
    def of(cls, slots_A: Tensor, documents: PackedDocuments, *, on_host: Tensor) -> Blocks:
        """Return the blocks with these roots.

        Args:
            documents: Of the batch; every slot is a column.
            on_host: `slots_A` on the CPU.
        """
        starts = [columns.start for _, columns in documents.slices]
        edges = torch.searchsorted(on_host, torch.tensor([*starts, documents.slices[-1][1].stop])).tolist()
        spans = tuple(
            Span(slice(first, last), slice(start, int(on_host[last - 1])))
            for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True)
            if first < last
        )
        return cls(slots_A, spans, on_host)

    @classmethod
    def every(cls, like_BT: Tensor, documents: PackedDocuments) -> Blocks:
        """Return a block at every slot of a batch of this shape."""
        slots_N = torch.arange(like_BT.numel())
        return cls.of(slots_N.to(like_BT.device), documents, on_host=slots_N)

    def padded(self, documents: PackedDocuments) -> Blocks:
        """Return these blocks and the last one several times more, so that their number is one of few. Nothing reads those."""
        more = few_sizes(self.count) - self.count
        slots_A, on_host = (torch.cat([slots, slots[-1:].expand(more)]) for slots in (self.slots_A, self.on_host))
        return Blocks.of(slots_A, documents, on_host=on_host)

    @property
    def count(self) -> int:
        """Blocks of the pass."""
        return len(self.on_host)

    def at(self, values_BT: Tensor, *, places: int = 0) -> Tensor:
        """Return values_A, `places` after each root. No trained row reads beyond its document's end."""
        return values_BT.flatten().roll(-places).index_select(0, self.slots_A)

    def pieces(self, size: int) -> Iterator[Span]:
        """Yield the spans in pieces of at most `size` blocks."""
        for span in self.spans:
            for start in range(span.blocks.start, span.blocks.stop, size):
                stop = min(start + size, span.blocks.stop)
                yield Span(slice(start, stop), slice(span.columns.start, int(self.on_host[stop - 1])))

    def parts(self, size: int) -> Iterator[Blocks]:
        """Yield consecutive parts of at most `size` blocks, each as a pass of its own."""
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            yield Blocks(self.slots_A[start:stop], tuple(self._within(start, stop)), self.on_host[start:stop])

    def _within(self, start: int, stop: int) -> Iterator[Span]:
        for span in self.spans:
            first, last = max(start, span.blocks.start), min(stop, span.blocks.stop)
            if first < last:
                columns = slice(span.columns.start, int(self.on_host[last - 1]))
                yield Span(slice(first - start, last - start), columns)
