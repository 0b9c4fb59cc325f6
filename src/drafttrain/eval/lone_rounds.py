"""Lone rounds and forwards: what one way of decoding calls in a round, and how long its calls take on this machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, Round
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.arms import Arm, Source
from drafttrain.eval.clock import TARGET, CalibratedClock, Host, fitted
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM

ROUNDS = 6
"""Rounds that are recorded; their mean counts, because policies and catching up make them differ."""
TURNS = 3
"""Repetitions of timed calls. The fastest one counts: other work on a machine only adds time."""
FORWARDS = (1, 8, 64)
"""New tokens of the lone forwards of the target."""
CALIBRATION_LENGTHS = (3, 6)
"""Draft tokens of the lone rounds that the drafter's clock and the host's time are fitted to."""
LONG_TEXT = 192
"""Tokens of the longer text that calls are timed after."""

NO_END = 1 << 20
CALIBRATION_TOKENS = 48
"""New tokens of the outputs on which a policy that measures is calibrated."""
"""Most new tokens of an output that is stopped after some rounds: each of them then has its full budget."""


@dataclass(frozen=True)
class LoneRound:
    """One round of one sequence."""

    forwards: Sequence[ForwardEvent]
    draft: Budget
    """Nodes and levels as drafted; width and form as the length policy wanted them."""
    seconds: float
    """The whole round."""

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens: all nodes without the root."""
        return self.draft.nodes

    @property
    def host_seconds(self) -> float:
        """The round without its forwards."""
        return max(0.0, self.seconds - sum(event.seconds for event in self.forwards))


class _EnoughError(Exception):
    """Ends a decoding."""


def lone_rounds(
    source: Source,
    target: Target,
    prompt: Prompt,
    settings: EvalSettings,
    *,
    length: Any,
    count: int = ROUNDS,
) -> list[LoneRound]:
    """Return rounds of a prompt after the first one, each with its full budget.

    Args:
        settings: Their rule, seed and first temperature count. No token ends the text.
        length: Settings of the length policy.
    """
    sampling = Sampling(settings.temperatures[0], settings.top_p, settings.top_k)
    limits = replace(settings, max_new_tokens=NO_END)
    arm = Arm.create("lone", source, target, sampling, limits, length=length, stop_tokens=())
    if arm.measuring:
        arm.engine.max_new_tokens = CALIBRATION_TOKENS
        arm.warm_up([prompt])
        arm.engine.max_new_tokens = NO_END
    ends, rounds = list[float](), list[Round]()

    def on_round(context: Context, one: Round) -> None:
        ends.append(time.perf_counter())
        rounds.append(one)
        if len(rounds) > count:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        arm.engine.generate([prompt], on_round=on_round)
    wanted = arm.engine.policy.budget(Context(prompt.id, list(prompt.tokens), len(prompt.tokens)))
    found = [
        LoneRound(forwards, replace(wanted, nodes=one.num_draft_tokens, depth=one.max_depth), end - begin)
        for forwards, one, begin, end in zip(arm.ledger.by_round()[1:], rounds[1:], ends, ends[1:], strict=False)
    ]
    return found[:count]


def fastest(turns: Sequence[Sequence[LoneRound]]) -> list[LoneRound]:
    """Return the same rounds with each time the smallest of several turns."""
    return [
        LoneRound(
            _fastest_events([one.forwards for one in same]),
            same[0].draft,
            min(one.seconds for one in same),
        )
        for same in zip(*turns, strict=True)
    ]


def _fastest_events(turns: Sequence[Sequence[ForwardEvent]]) -> list[ForwardEvent]:
    return [replace(same[0], span=Span.of(min(event.seconds for event in same))) for same in zip(*turns, strict=True)]


def lone_forwards(target: Target, texts: Sequence[Sequence[int]]) -> list[ForwardEvent]:
    """Return the fastest of several forwards of the target with 1, 8 and 64 new tokens after each text."""
    events: list[ForwardEvent] = []
    lm = CachedLM(target.model, name=TARGET, listener=events.append)
    turns: list[list[ForwardEvent]] = []
    for _ in range(TURNS + 1):
        for text in texts:
            lm.begin([text])
            for count in FORWARDS:
                lm.forward([[text[-1]] * count])
                lm.keep([[]])
        turns.append([event for event in events if not event.prefill])
        events.clear()
    # The first turn warms up.
    return _fastest_events(turns[1:])


@dataclass(frozen=True)
class Here:
    """This machine: a clock for the forwards of both models, and the time beside them."""

    clock: CalibratedClock
    host: Host
    plain_host: Host
    forwards: Sequence[ForwardEvent]
    """The target's lone forwards that its clock is fitted to."""


def calibrated(source: Source, target: Target, prompt: Prompt, settings: EvalSettings) -> Here:
    """Calibrate this machine: the target by lone forwards, the drafter and the host by lone rounds of other lengths.

    Nothing of it is a run whose speed is predicted.
    """
    longer = replace(prompt, tokens=(list(prompt.tokens) * LONG_TEXT)[:LONG_TEXT])
    forwards = lone_forwards(target, [prompt.tokens, longer.tokens])
    lengths = [FixedLengthSettings(count) for count in CALIBRATION_LENGTHS]
    arms: list[tuple[Source, Any, Prompt]] = [(PLAIN, settings.length, prompt)]
    arms += [(source, length, text) for length in lengths for text in (prompt, longer)]
    turns: list[list[list[LoneRound]]] = [[] for _ in arms]
    for turn in range(TURNS + 1):
        for (own, length, text), found in zip(arms, turns, strict=True):
            rounds = lone_rounds(own, target, text, settings, length=length)
            if turn:
                found.append(rounds)
    plain, *drafted = [fastest(found) for found in turns]
    own_events = [event for rounds in drafted for one in rounds for event in one.forwards if event.model == "drafter"]
    clocks = {TARGET: fitted(forwards)} | ({"drafter": fitted(own_events)} if own_events else {})
    return Here(
        CalibratedClock(clocks),
        _host([one for rounds in drafted for one in rounds]),
        Host(_mean([one.host_seconds for one in plain])),
        forwards,
    )


def _host(rounds: Sequence[LoneRound]) -> Host:
    """Return the time beside the forwards, as a line over the number of draft tokens."""
    few, many = (
        [one for one in rounds if one.num_draft_tokens == count]
        for count in (min(one.num_draft_tokens for one in rounds), max(one.num_draft_tokens for one in rounds))
    )
    least, most = (_mean([one.host_seconds for one in part]) for part in (few, many))
    tokens = many[0].num_draft_tokens - few[0].num_draft_tokens
    slope = max(0.0, (most - least) / tokens) if tokens else 0.0
    return Host(max(0.0, least - slope * few[0].num_draft_tokens), slope)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
