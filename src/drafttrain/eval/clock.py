"""Clocks: the time of a forward, as it was measured or as a device of known speed would take; and the time of rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drafttrain.core.generations import ForwardEvent
from drafttrain.core.gpus import Gpu

Clock = Callable[[ForwardEvent], float]
"""Returns the seconds of a forward."""

TARGET = "target"


def measured(event: ForwardEvent) -> float:
    """Return the time that the forward took where it ran."""
    return event.seconds


@dataclass(frozen=True)
class Roofline:
    """A forward takes as long as the slower of its reads and its operations, and the launches of its layers.

    Source: Williams et al. 2009, Roofline, CACM 52(4), for the form.
    """

    bandwidth: float
    """Bytes per second."""
    flops: float
    """Operations per second."""
    layer_seconds: float = 0.0
    """Time to launch the kernels of a layer."""
    call_seconds: float = 0.0
    """Time of a call that does not depend on its sizes."""
    overlaps: bool = True
    """Reads and operations take place at the same time, as on a GPU; False: one after the other."""

    def __call__(self, event: ForwardEvent) -> float:
        reads, computes = event.work.bytes_read / self.bandwidth, event.work.flops / self.flops
        body = max(reads, computes) if self.overlaps else reads + computes
        return body + event.shape.num_layers * self.layer_seconds + self.call_seconds


@dataclass(frozen=True)
class Efficiency:
    """What a forward reaches of a GPU's data sheet. The defaults are assumptions."""

    bandwidth: float = 0.7
    """Share of the bandwidth."""
    flops: float = 0.5
    """Share of the peak."""
    layer_seconds: float = 8e-6
    """Launch of a layer: 8 microseconds with CUDA graphs or compiled code, about 60 where Python launches every kernel."""


DATA_SHEET = Efficiency(1.0, 1.0, 0.0)


def roofline_of(gpu: Gpu, efficiency: Efficiency) -> Roofline:
    """Return the clock of a GPU of the table."""
    return Roofline(
        gpu.bandwidth * efficiency.bandwidth, gpu.peak_flops * efficiency.flops, layer_seconds=efficiency.layer_seconds
    )


@dataclass(frozen=True)
class CalibratedClock:
    """A clock for each model, fitted to its lone forwards on one machine."""

    by_model: Mapping[str, Roofline]

    def __call__(self, event: ForwardEvent) -> float:
        # The first blocks of the target are the target.
        name = event.model if event.model in self.by_model else TARGET
        return self.by_model[name](event)


def fitted(events: Sequence[ForwardEvent]) -> Roofline:
    """Return the clock whose times are nearest to those of these forwards, relative to their size, by least squares.

    Seconds = per call + bytes / bandwidth + operations / rate, none of them negative. Forwards of one model read nearly the same
    bytes, so what is fixed of a call may be counted as reads or as its overhead: both predict the same.
    """
    from scipy.optimize import nnls

    rows_NC = np.array([[1.0, event.work.bytes_read, event.work.flops] for event in events])
    scale_C = rows_NC.max(axis=0)
    seconds_N = np.array([event.seconds for event in events])
    found_C, _ = nnls(rows_NC / scale_C / seconds_N[:, None], np.ones(len(events)))
    call, of_bytes, of_flops = (float(value) for value in found_C / scale_C)
    return Roofline(
        bandwidth=1 / of_bytes if of_bytes else float("inf"),
        flops=1 / of_flops if of_flops else float("inf"),
        call_seconds=call,
        overlaps=False,
    )


@dataclass(frozen=True)
class Host:
    """Time of a round beside its forwards: Python, probabilities, the acceptance rule, caches."""

    round_seconds: float = 0.0
    draft_token_seconds: float = 0.0
    """More for each draft token."""

    def __call__(self, num_draft_tokens: float) -> float:
        return self.round_seconds + self.draft_token_seconds * num_draft_tokens


NO_HOST = Host()


def serial_seconds(rounds: Iterable[Sequence[ForwardEvent]], clock: Clock) -> list[float]:
    """Return the time of each round whose forwards run one after the other."""
    return [sum(clock(event) for event in forwards) for forwards in rounds]


def pipelined_seconds(rounds: Iterable[Sequence[ForwardEvent]], clock: Clock) -> list[float]:
    """Return the time of each round on two devices: the drafter drafts while the target verifies.

    Both begin a round when both have ended the last one: the verdict decides what is drafted next.
    """
    found = []
    for forwards in rounds:
        on_target = [event.model == TARGET for event in forwards]
        seconds = [clock(event) for event in forwards]
        verifying = sum(one for one, target in zip(seconds, on_target, strict=True) if target)
        found.append(max(verifying, sum(seconds) - verifying))
    return found
