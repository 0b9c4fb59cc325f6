"""What happened on the pretended devices: what was refused, where the host waited, what was copied; each with its place."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

PROJECT = str(Path(__file__).parents[2] / "src") + "/"
MACHINERY = {
    str(Path(__file__).with_name(f"{name}.py"))
    for name in ("groups", "happenings", "refusals", "runtime", "tensors", "waits")
}


@dataclass
class Happenings:
    """Counts by (what, place)."""

    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What CUDA does not do."""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Where the host stood still until the device had done all that was asked of it."""
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """From memory of the host that is not pinned: the host is held up for as long as it is copied."""
    operations: int = 0
    """On a device: so many kernels at least would be launched."""

    def clear(self) -> None:
        """Begin to count."""
        for counts in (self.refusals, self.waits, self.copies):
            counts.clear()
        self.operations = 0

    @property
    def num_waits(self) -> int:
        """All places together."""
        return sum(self.waits.values())

    @property
    def num_copies(self) -> int:
        """All places together."""
        return sum(self.copies.values())

    def require_no_refusal(self) -> None:
        """Fail where CUDA would have refused something, whoever caught it."""
        assert not self.refusals, f"CUDA refuses this\n{self.report()}"

    def report(self) -> str:
        """Return the table that a failed test shows."""
        lines = []
        for name in ("refusals", "waits", "copies"):
            counts: Counter[tuple[str, str]] = getattr(self, name)
            lines.append(f"{name}: {sum(counts.values())}")
            lines += [f"  {number:4d}  {what}  at {place}" for (what, place), number in counts.most_common(40)]
        return "\n".join(lines)


happenings = Happenings()
"""Of this process."""

_lock = threading.Lock()
_paused = threading.local()


def note(counts: Counter[tuple[str, str]], what: str) -> None:
    """Count one, at the line of the project that is at work."""
    if not getattr(_paused, "on", False):
        with _lock:
            counts[what, place()] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing that this thread does: a test that looks at a result."""
    _paused.on = True
    try:
        yield
    finally:
        _paused.on = False


def place() -> str:
    """Return the innermost line of the project, else of the code that called torch; the backward pass has neither."""
    frame: FrameType | None = sys._getframe(1)
    other = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT):
            return f"{name.removeprefix(PROJECT)}:{frame.f_lineno}"
        if not other and "/torch/" not in name and name not in MACHINERY:
            other = f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "the backward pass"
