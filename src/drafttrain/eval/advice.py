"""From measured acceptance and the clock of a device: the speed-up of every draft length by batch and context, and what to choose.

The acceptance is measured here and does not depend on the device. Times are the clock's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from drafttrain.core.generations import ForwardEvent
from drafttrain.core.gpus import RESERVED_BYTES
from drafttrain.core.proposals import Budget
from drafttrain.eval.clock import NO_HOST, TARGET, Clock, Host, pipelined_seconds, serial_seconds
from drafttrain.eval.decoding_memory import DecodingMemory
from drafttrain.eval.interval import Interval
from drafttrain.eval.lone_rounds import LoneRound
from drafttrain.eval.result import Speedup

MOST_SEQUENCES = 4096
"""Largest batch that is searched for the end of the gain."""

ASSUMED = (
    "all sequences of a batch are as long as the context, and go through their rounds together",
    "acceptance does not depend on the context's length, the batch, or the type of the numbers",
    "weights are read once per call, the cache once per sequence; nothing stays in the device's own caches",
    "of a mixture of experts all experts are read",
    "prefill is not counted",
)


@dataclass(frozen=True)
class Candidate:
    """One way of drafting, with its measured acceptance and what its rounds call."""

    length: Mapping[str, Any]
    """Kind and settings of the length policy."""
    block_efficiency: Interval
    """Tokens per target call."""
    from_replay: bool
    """Computed by replay; False: decoded."""
    rounds: Sequence[LoneRound]
    """Some rounds of one sequence."""
    pipelined: bool = False
    """The drafter has a device of its own."""

    @property
    def num_draft_tokens(self) -> float:
        """Of a mean round."""
        return sum(one.draft.nodes for one in self.rounds) / len(self.rounds)

    @property
    def draft(self) -> Budget:
        """The draft of a mean round."""
        depth = sum(one.draft.depth for one in self.rounds) / len(self.rounds)
        return replace(self.rounds[-1].draft, nodes=round(self.num_draft_tokens), depth=round(depth))


@dataclass(frozen=True)
class Device:
    """A device that is asked about."""

    name: str
    clock: Clock
    how: str
    """How its speed is known."""
    host: Host = NO_HOST
    plain_host: Host = NO_HOST
    width: float = 1.0
    """Bytes of its numbers, divided by those of the numbers here."""
    memory_bytes: float | None = None
    """None: not known."""


@dataclass(frozen=True)
class Predicted:
    """One point of the surface."""

    device: str
    batch: int
    context: int
    length: Mapping[str, Any]
    block_efficiency: Interval
    from_replay: bool
    speedup: Interval
    """Over plain decoding; its interval is that of the acceptance alone."""
    tokens_per_second: float
    """Of all sequences together."""
    round_ms: float
    plain_ms: float
    """A round of plain decoding: one token of each sequence."""
    gigabytes: float
    """Weights, caches, logits and masks of both models, without prefill and activations."""
    fits: bool
    """Into the device's memory, as far as that is known."""


@dataclass(frozen=True)
class End:
    """Where the gain ends."""

    device: str
    context: int
    batch: int | None
    """The smallest batch whose best length is no faster than plain decoding; None: there is none up to `MOST_SEQUENCES`."""


@dataclass(frozen=True)
class MeasuredSpeedup:
    """A speed-up that the evaluation measured itself, on the same machine as a device of the surface."""

    device: str
    batch: int
    length: Mapping[str, Any]
    speedup: Speedup


@dataclass(frozen=True)
class Advice:
    """What `advise` found: advice.json."""

    drafter: str
    target: str
    temperature: float
    num_prompts: int
    surface: Sequence[Predicted]
    ends: Sequence[End]
    measured: Sequence[str]
    assumed: Sequence[str]
    speeds: Sequence[MeasuredSpeedup]
    """None where the machine of the evaluation was not asked about."""
    evaluated: str
    """Date of the evaluation that the acceptance is from."""

    def best(self) -> list[Predicted]:
        """Return the fastest length at each device, context and batch; plain decoding is none of them."""
        found: dict[tuple[str, int, int], Predicted] = {}
        for one in self.surface:
            key = (one.device, one.context, one.batch)
            if key not in found or one.speedup.value > found[key].speedup.value:
                found[key] = one
        return list(found.values())


@dataclass(frozen=True)
class Recorded:
    """What was recorded here of decoding with a drafter."""

    candidates: Sequence[Candidate]
    plain: ForwardEvent
    """The target's call in a round of plain decoding of one sequence."""
    memory: DecodingMemory

    def surface(self, devices: Sequence[Device], *, batches: Sequence[int], contexts: Sequence[int]) -> list[Predicted]:
        """Return every candidate at every device, context and batch."""
        return [
            self.predicted(one, device, batch=batch, context=context)
            for device in devices
            for context in contexts
            for batch in batches
            for one in self.candidates
        ]

    def predicted(self, candidate: Candidate, device: Device, *, batch: int, context: int) -> Predicted:
        """Return the speed-up of a way of drafting on a device."""
        moved = [_moved(one.forwards, device, batch=batch, context=context) for one in candidate.rounds]
        seconds = (pipelined_seconds if candidate.pipelined else serial_seconds)(moved, device.clock)
        forwards_seconds = sum(seconds) / len(moved)
        round_seconds = forwards_seconds + device.host(candidate.num_draft_tokens)
        plain = self.plain.at(batch=batch, context=context, width=device.width)
        plain_seconds = device.clock(plain) + device.plain_host(0)
        gain, tokens = plain_seconds / round_seconds, candidate.block_efficiency
        held = device.width * self.memory.peak(candidate.draft, context, batch=batch)
        return Predicted(
            device=device.name,
            batch=batch,
            context=context,
            length=candidate.length,
            block_efficiency=tokens,
            from_replay=candidate.from_replay,
            speedup=Interval(tokens.value * gain, tokens.low * gain, tokens.high * gain, tokens.num_prompts),
            tokens_per_second=batch * tokens.value / round_seconds,
            round_ms=1000 * round_seconds,
            plain_ms=1000 * plain_seconds,
            gigabytes=held / 1e9,
            fits=device.memory_bytes is None or held + RESERVED_BYTES <= device.memory_bytes,
        )

    def end_of_gain(self, device: Device, *, context: int) -> int | None:
        """Return the smallest batch at which no candidate is faster than plain decoding; None: there is none.

        The gain is assumed to fall with the batch: batches are doubled, then the last interval is halved.
        """

        def pays(batch: int) -> bool:
            found = self.surface([device], batches=[batch], contexts=[context])
            return any(one.speedup.value > 1 for one in found)

        below, batch = 0, 1
        while pays(batch):
            below, batch = batch, 2 * batch
            if batch > MOST_SEQUENCES:
                return None
        while batch - below > 1:
            middle = (below + batch) // 2
            below, batch = (middle, batch) if pays(middle) else (below, middle)
        return batch


def _moved(forwards: Sequence[ForwardEvent], device: Device, *, batch: int, context: int) -> list[ForwardEvent]:
    """Return the forwards of a round as they would be in a batch after longer texts."""
    base = next(event.shape.context for event in forwards if event.model == TARGET)
    return [
        event.at(batch=batch, context=max(0, context + event.shape.context - base), width=device.width)
        for event in forwards
    ]
