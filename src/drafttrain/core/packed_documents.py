"""Where the documents of packed rows lie.

B = sequences, T = positions, N = slots of all rows, one after another
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class PackedDocuments:
    """The slots of each document among those of all rows; the padding of a row is a document too."""

    bounds: Tensor
    """Where each document begins, and where the last one ends: int32, as kernels want it."""
    longest: int
    """No document has more slots."""

    @classmethod
    def of(cls, positions_BT: Tensor) -> PackedDocuments:
        """Return the documents of rows whose positions restart at 0 with each. Waits for a device that is no CPU."""
        starts = (positions_BT.flatten() == 0).nonzero()[:, 0]
        return cls(pad(starts, (0, 1), value=positions_BT.numel()).int(), longest=positions_BT.shape[1])

    def each(self, change: Callable[[Tensor], Tensor]) -> PackedDocuments:
        """Return the same of changed tensors: moved, pinned."""
        return replace(self, bounds=change(self.bounds))

    @cached_property
    def slices(self) -> list[slice]:
        """The slots of each document."""
        return [slice(first, stop) for first, stop in pairwise(self.bounds.tolist())]
