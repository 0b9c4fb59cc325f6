"""Time of each phase of a step, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

PHASES = ("fetch", "draw", "target", "forward", "backward", "optimizer", "validation", "checkpoint", "other")
"""The phases of a step, in order."""

PENDING = 512
"""Unread events on CUDA; when there are more, those that the device has passed are read."""


class StepClock:
    """Sums the time of each phase. One phase runs at any time: entering the next ends it.

    On CUDA a moment is an event in the stream, so a time is how long the device was busy with a phase or waited in it, and it is
    read when the device has passed it. On a CPU a moment is the clock's.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Seconds of each phase since the last `read`."""
        self.steps = 0
        """Steps that ended since the last `read`."""
        self.label = False
        """Mark the phases for a profiler."""
        self._on_device = False
        self._last: tuple[str, Any] | None = None
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._free: list[Any] = []
        self._range: Any = None

    def begin(self, device: torch.device) -> None:
        """Start to measure on a device; the time until the first batch arrives is `fetch`."""
        # torch without CUDA has no events.
        self._on_device = device.type == "cuda" and torch.backends.cuda.is_built()
        self._pending.clear()
        self._last = None
        self.enter("fetch")

    def enter(self, phase: str) -> None:
        """End the current phase and start this one."""
        assert phase in PHASES, phase
        moment = self._now()
        if self._last is not None:
            self._add(*self._last, moment)
        self._last = (phase, moment)
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self.label:
            self._range = torch.profiler.record_function(f"drafttrain: {phase}")
            self._range.__enter__()

    def end_of_step(self) -> None:
        """Count a step."""
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and reset them. On CUDA this waits for the device."""
        if self._last is not None:
            self.enter(self._last[0])
        if self._pending:
            self._pending[-1][2].synchronize()
        self._fold()
        seconds, self.seconds, self.steps = self.seconds, dict.fromkeys(PHASES, 0.0), 0
        return seconds

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, phase: str, began: Any, ended: Any) -> None:
        if not self._on_device:
            self.seconds[phase] += ended - began
            return
        self._pending.append((phase, began, ended))
        if len(self._pending) > PENDING:
            self._fold()

    def _fold(self) -> None:
        """Read the events that the device has passed, and reuse them."""
        while self._pending and self._pending[0][2].query():
            phase, began, ended = self._pending.popleft()
            self.seconds[phase] += began.elapsed_time(ended) / 1000
            self._free.append(began)
