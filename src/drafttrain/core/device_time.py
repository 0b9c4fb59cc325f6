"""How long a device worked on something, measured without waiting for it."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Span:
    """The time of a device from here to `end`.

    On CUDA both are events among the work that is asked of the device. Only reading `seconds` waits for them, so read it when all is
    done: a wait within a loop would be part of what the loop is measured by.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._ended: Any = None

    def end(self) -> Span:
        """End here."""
        self._ended = self._now()
        return self

    @cached_property
    def seconds(self) -> float:
        """The time between; waits until the device has come so far."""
        assert self._ended is not None, "it has not ended"
        if self._device.type != "cuda":
            return float(self._ended - self._began)
        if not self._ended.query():
            self._ended.synchronize()
        seconds = float(self._began.elapsed_time(self._ended)) / 1000
        self._began = self._ended = ()  # events are a resource of the device
        return seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
