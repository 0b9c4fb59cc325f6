"""Measures device time without waiting for the device."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Span:
    """The device time from construction to `end`.

    On CUDA both are events in the stream. Only reading `seconds` waits for them, so read it after the loop: a wait inside a
    measured loop would count as part of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._ended: Any = None

    @classmethod
    def of(cls, seconds: float) -> Span:
        """Return a span of a known time, measured earlier."""
        span = cls.__new__(cls)
        span.__dict__["seconds"] = seconds
        return span

    def end(self) -> Span:
        """End here."""
        self._ended = self._now()
        return self

    @cached_property
    def seconds(self) -> float:
        """The time between; waits until the device has passed `end`."""
        assert self._ended is not None, "call `end` first"
        if self._device.type != "cuda":
            return float(self._ended - self._began)
        if not self._ended.query():
            self._ended.synchronize()
        seconds = float(self._began.elapsed_time(self._ended)) / 1000
        self._began = self._ended = ()  # release the events, which the device has a limited number of
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
