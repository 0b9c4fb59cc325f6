"""The draft length that decodes fastest on this machine, by the block efficiency of an evaluation and rounds timed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_about
from drafttrain.core.console import progress
from drafttrain.core.provenance import processor as own_processor
from drafttrain.core.registry import component_mapping
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.arms import Arm
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.result import DrafterFigures, Result, read_result
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target

TIMED_TOKENS = 5
"""New tokens of an output whose rounds are timed."""

REPLAYED = (1, 2, 4, 8)
"""Draft tokens of the chains that are tried beside the evaluated lengths."""

TURNS = 2
"""Outputs per length; the faster one counts, because other work on a machine only adds time."""


@dataclass(frozen=True)
class Fastest:
    """The chosen length."""

    length: Any
    """Settings of the policy."""
    predicted_speedup: float
    """Over plain decoding in the same engine: evaluated tokens per round over timed seconds per round."""


@dataclass(frozen=True)
class KnownLengths:
    """What the evaluation of a drafter says about draft lengths at one temperature."""

    block_efficiencies: Sequence[tuple[Mapping[str, Any], float]]
    """Kind and settings of each evaluated policy with its tokens per round, then those of chains that replay computed."""
    fastest: Mapping[str, Any]
    """The evaluated policy with the highest measured speed-up."""
    dtype: str
    """Of the target's weights."""
    processor: str

    def times_hold_for(self, target: Target) -> bool:
        """Return whether the evaluation's own times are those of this machine and this type of weights."""
        return times_hold_for(target, dtype=self.dtype, processor=self.processor)


def times_hold_for(target: Target, *, dtype: str, processor: str) -> bool:
    """Return whether times with this type of weights on this processor are those of a target here."""
    own = str(target.model.dtype).removeprefix("torch.")
    return target.device.type == "cpu" and (dtype, processor) == (own, own_processor())


def known_lengths(folder: Path, *, temperature: float) -> KnownLengths | None:
    """Return what the eval.json of a drafter, or of its run, says about lengths.

    The nearest temperature that was evaluated counts. Lossy rules do not count, nor policies that read a head: its folder may be
    elsewhere.

    Returns:
        None: there is no evaluation.
    """
    for path in (folder / "eval.json", folder.parent / "eval.json"):
        result = read_result(path) if path.exists() else None
        if result is None or result.changed_rounds:
            continue
        if arms := evaluated_lengths(result, temperature, folder):
            evaluated = [(figures.length, figures.block_efficiency.value) for figures in arms]
            chains = {int(count): found.value for count, found in arms[0].replay.items() if int(count) in REPLAYED}
            replayed = [
                (component_mapping(FixedLengthSettings(num_draft_tokens=count)), value)
                for count, value in chains.items()
            ]
            known = [length for length, _ in evaluated]
            return KnownLengths(
                [*evaluated, *(one for one in replayed if one[0] not in known)],
                max(arms, key=lambda figures: figures.speedup.value).length,
                result.target.dtype,
                result.provenance.machine.processor,
            )
    return None


def fastest_length(
    known: Sequence[tuple[Any, float]],
    drafter: Drafter,
    target: Target,
    prompt: Prompt,
    settings: EvalSettings,
) -> Fastest:
    """Return the length with the most tokens per second: evaluated tokens per round over seconds of rounds timed here.

    How long a round takes depends on the processor and the type of the weights, how many tokens it yields does not.

    Args:
        known: Settings of length policies, at least one, with their block efficiency.
        target: The target that the drafter drafts for: with its adapters.
        prompt: Its first tokens are decoded with every length.
        settings: Their first temperature counts.
    """
    short = replace(settings, max_new_tokens=min(settings.max_new_tokens, TIMED_TOKENS))
    sampling = Sampling(settings.temperatures[0])
    arms = [Arm.create("plain", PLAIN, target, sampling, short, length=settings.length)]
    arms += [Arm.create("drafter", drafter, target, sampling, short, length=length) for length, _ in known]
    plain, *drafted = _round_seconds(arms, prompt)
    return fastest_of(known, drafted, plain_seconds=plain)


def fastest_of(known: Sequence[tuple[Any, float]], seconds: Sequence[float], *, plain_seconds: float) -> Fastest:
    """Return the length with the most tokens per second.

    Args:
        known: Lengths with their tokens per round.
        seconds: The time of a round of each.
        plain_seconds: The time of a token of plain decoding.
    """
    speedups = [value * plain_seconds / own for (_, value), own in zip(known, seconds, strict=True)]
    best = max(range(len(known)), key=speedups.__getitem__)
    return Fastest(known[best][0], speedups[best])


def _round_seconds(arms: Sequence[Arm], prompt: Prompt) -> list[float]:
    """Return the time of a round of each arm; the arms take turns."""
    found: list[list[float]] = [[] for _ in arms]
    with progress("timing draft lengths", total=TURNS * len(arms), unit="outputs") as bar:
        for number, arm in enumerate(arms):
            if number in (0, len(arms) - 1) or arm.measuring:
                arm.warm_up([prompt])
        for _ in range(TURNS):
            for arm, times in zip(arms, found, strict=True):
                (one,) = arm.engine.generate([prompt])
                times.append((one.seconds - one.prefill_seconds) / len(one.rounds))
                bar.advance(1)
    return [min(times) for times in found]


def evaluated_lengths(result: Result, temperature: float, folder: Path) -> list[DrafterFigures]:
    """Return the lossless figures of the drafter in a folder at each draft length, at the nearest temperature that was evaluated.

    Policies that read a head or a calibration are left out: it may be elsewhere. Empty: this drafter was not evaluated there.
    """
    part = min(result.temperatures, key=lambda one: abs(one.temperature - temperature))
    about = read_about(folder)
    # Drafters of several runs have the same name; a rejected one has another name now.
    same = [name for name, one in result.drafters.items() if about is not None and one.about == about]
    named = [name for name, one in result.drafters.items() if one.folder == folder.name]
    only = list(result.drafters) if len(result.drafters) == 1 else []
    own = next(iter([*(name for name in same if name in named), *same, *named, *only]), None)
    return [
        figures
        for name, figures in part.drafters.items()
        if own is not None
        and (name == own or name.startswith(f"{own} ("))
        and not figures.lossy
        and not (figures.length.get("head") or figures.length.get("calibration"))
    ]
