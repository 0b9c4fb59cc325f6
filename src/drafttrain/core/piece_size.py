"""How much of a computation exists at once: little on a CPU, whose caches hold no more, and much elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_counted: ContextVar[str | None] = ContextVar("counted", default=None)


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """Let pieces have the size that they have on this type of device (`cpu`, `cuda`), wherever their tensors are.

    Only a count of operations and memory needs it: its tensors have no data, and their device is not the one that is asked about.
    """
    before = _counted.set(device_type)
    try:
        yield
    finally:
        _counted.reset(before)


@dataclass(frozen=True)
class PieceSize:
    """The size of a piece, in the unit of the computation: bytes, or scores."""

    on_cpu: int
    elsewhere: int

    def on(self, device: torch.device) -> int:
        """Return the size on the device of a computation, or on the one whose cost is counted."""
        return self.on_cpu if (_counted.get() or device.type) == "cpu" else self.elsewhere
