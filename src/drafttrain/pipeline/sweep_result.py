"""What a sweep found: the figures of its arms, compared on the same prompts. These dataclasses are sweep.json.

A number that was not measured is nan here and null in the file.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from drafttrain.core.errors import DrafttrainError
from drafttrain.core.foreign import read_json
from drafttrain.core.provenance import provenance
from drafttrain.eval.figures import compare
from drafttrain.eval.interval import Interval
from drafttrain.eval.metrics import PromptCounts, over_seeds, totals_of
from drafttrain.eval.result import PairedComparison, Result, read_result
from drafttrain.eval.slices import part_of
from drafttrain.eval.statistics import ratio_interval
from drafttrain.pipeline.folder import RunFolder
from drafttrain.training.result import TrainResult

FORMAT = 1
"""Version of sweep.json."""
DRAFTER = "drafter"
"""The arm of eval.json that is compared."""
RATE = "train.lr"


@dataclass(frozen=True)
class CurvePoint:
    """One validation of a training."""

    step: int
    tokens: float
    """Read since the start, over all devices."""
    seconds: float
    """Since the start of the training, validations included."""
    block_efficiency: float
    """By replay on the validation prompts."""
    low: float
    """Of its 95 % interval over the validation prompts; nan: one prompt, or a run of a version that did not store it."""
    high: float


@dataclass(frozen=True)
class SweepRun:
    """One finished run: an arm with one seed."""

    seed: int
    folder: str
    tokens: float
    seconds: float
    exported_step: int
    accepted: bool
    """Whether it met export.require."""
    curve: Sequence[CurvePoint]

    @property
    def validated(self) -> float:
        """Block efficiency of the exported step on the validation prompts; nan without validation."""
        return next((one.block_efficiency for one in self.curve if one.step == self.exported_step), math.nan)


@dataclass(frozen=True)
class ArmAtTemperature:
    """An arm on the test prompts at one temperature: counts are summed over prompts and seeds, then divided once."""

    temperature: float
    block_efficiency: Interval
    by_seed: Sequence[float]
    """Block efficiency of each seed, in their order."""
    draft_acceptance_rate: float
    """Accepted / drafted."""
    lossy: bool
    """Whether its acceptance rule changes the distribution of the output."""
    difference: PairedComparison | None
    """Block efficiency minus that of the baseline, paired over prompts; None: the baseline itself."""
    prompts: Sequence[PromptCounts]
    """Summed over the seeds."""


@dataclass(frozen=True)
class ArmFigures:
    """A finished arm, all seeds together."""

    name: str
    settings: Mapping[str, str]
    runs: Sequence[SweepRun]
    tokens: float
    """Trained tokens, mean over the seeds."""
    seconds: float
    """Of the training, mean over the seeds."""
    validated: float
    """Block efficiency of the exported steps on the validation prompts."""
    curve: Sequence[CurvePoint]
    """Of the steps that all seeds validated."""
    temperatures: Sequence[ArmAtTemperature]


@dataclass(frozen=True)
class SweepResult:
    """A sweep: the content of sweep.json."""

    format: int
    recipe: str
    axes: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    baseline: str
    """The first finished arm: differences are to it."""
    num_prompts: int
    """Prompts that all arms decoded: only these count."""
    num_prompts_of_some: int
    """Further prompts that only some arms decoded, because the training text of others contaminates them."""
    arms: Sequence[ArmFigures]
    failed: Mapping[str, str]
    """Error of each run that failed, by its name."""
    notes: Sequence[str]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """What a finished run left in its folder."""

    run: SweepRun
    result: Result
    inputs: Mapping[str, Any]


def read_finished(folder: Path, *, seed: int) -> Finished:
    """Return what a finished run left in its folder.

    Raises:
        DrafttrainError: A file is missing or damaged.
    """
    run = RunFolder(folder)
    try:
        done = TrainResult(**json.loads(run.train_done.read_text(encoding="utf-8")))
        with (run.train / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curve = [
            CurvePoint(
                int(r["step"]),
                float(r["tokens"]),
                float(r["seconds"]),
                float(r[VALIDATED]),
                *(float(r.get(f"{VALIDATED}_{end}") or "nan") for end in ("low", "high")),
            )
            for r in rows
            if r.get(VALIDATED)
        ]
        tokens, seconds = float(rows[-1]["tokens"]), float(rows[-1]["seconds"])
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DrafttrainError(f"{folder}: train.json or metrics.csv cannot be read: {error}") from error
    accepted = run.exported(DRAFTER) == run.drafter
    result = read_result(run.eval)
    about = result.drafters[DRAFTER].about
    # `export.step` may have chosen another step than the best one.
    exported = about.trained_steps if about is not None else done.best_step
    measured = SweepRun(seed, folder.name, tokens, seconds, exported, accepted, curve)
    return Finished(measured, result, read_json(run.inputs))


VALIDATED = "validation_block_efficiency"
"""Column of metrics.csv."""


def sweep_result(
    finished: Mapping[str, Sequence[Finished]],
    *,
    settings: Mapping[str, Mapping[str, str]],
    axes: Mapping[str, Sequence[str]],
    rate: str | None,
    recipe: str,
    failed: Mapping[str, str],
) -> SweepResult:
    """Return the figures of the arms, each compared with the first one.

    Args:
        finished: The runs of each arm, one a seed; the same seeds in the same order for all arms.
        settings: By arm: its value on each axis.
        axes: All values of each axis.
        rate: The axis of the learning rate, if there is one.
        failed: Error of each run that failed.
    """
    every = [one for runs in finished.values() for one in runs]
    ids = [{count.id for count in _counts(one, number)} for one in every for number in range(_temperatures(one))]
    common = set.intersection(*ids) if ids else set()
    arms: list[ArmFigures] = []
    for name, runs in finished.items():
        arms.append(_arm(name, settings[name], runs, common, baseline=arms[0] if arms else None))
    return SweepResult(
        format=FORMAT,
        recipe=recipe,
        axes=axes,
        seeds=[one.run.seed for one in next(iter(finished.values()), ())],
        baseline=arms[0].name if arms else "",
        num_prompts=len(common),
        num_prompts_of_some=len(set().union(*ids)) - len(common),
        arms=arms,
        failed=failed,
        notes=[*_notes(arms, axes=axes, rate=rate), *_changed_inputs(every)],
        provenance=provenance(),
    )


def _arm(
    name: str,
    settings: Mapping[str, str],
    runs: Sequence[Finished],
    common: set[str],
    *,
    baseline: ArmFigures | None,
) -> ArmFigures:
    own = [one.run for one in runs]
    parts = []
    for number in range(_temperatures(runs[0]) if common else 0):
        by_seed = [sorted((c for c in _counts(one, number) if c.id in common), key=lambda c: c.id) for one in runs]
        counts = over_seeds(by_seed)
        other = baseline.temperatures[number].prompts if baseline else None
        parts.append(
            ArmAtTemperature(
                temperature=runs[0].result.temperatures[number].temperature,
                block_efficiency=ratio_interval(*part_of(counts)),
                by_seed=[totals_of(one).block_efficiency for one in by_seed],
                draft_acceptance_rate=totals_of(counts).draft_acceptance_rate,
                lossy=any(one.result.lossy for one in runs),
                difference=compare(counts, other) if other is not None else None,
                prompts=counts,
            )
        )
    return ArmFigures(
        name=name,
        settings=settings,
        runs=own,
        tokens=fmean(one.tokens for one in own),
        seconds=fmean(one.seconds for one in own),
        validated=_over_seeds([one.validated for one in own]),
        curve=_curve(own),
        temperatures=parts,
    )


def _curve(runs: Sequence[SweepRun]) -> list[CurvePoint]:
    """Return the curve over the seeds, at the steps that all of them validated."""
    by_step = [{point.step: point for point in run.curve} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    return [_mean([points[step] for points in by_step]) for step in steps]


def _mean(points: Sequence[CurvePoint]) -> CurvePoint:
    """Return the same step of all seeds as one point.

    Its interval has the mean reach of theirs. It is about prompts, and wide enough: all seeds are measured on the same
    prompts, and a mean has at most the mean of the standard errors, which it has where these errors go together.
    """
    value = _over_seeds([one.block_efficiency for one in points])
    return CurvePoint(
        points[0].step,
        fmean(one.tokens for one in points),
        fmean(one.seconds for one in points),
        value,
        value - fmean(one.block_efficiency - one.low for one in points),
        value + fmean(one.high - one.block_efficiency for one in points),
    )


def _over_seeds(efficiencies: Sequence[float]) -> float:
    """Return block efficiency over the seeds: their validation texts have about equally many tokens, so the rounds are averaged."""
    return math.nan if any(map(math.isnan, efficiencies)) else harmonic_mean(efficiencies)


def _temperatures(one: Finished) -> int:
    return len(one.result.temperatures)


def _counts(one: Finished, number: int) -> Sequence[PromptCounts]:
    return one.result.temperatures[number].drafters[DRAFTER].prompts


def chosen_by(arm: ArmFigures) -> float:
    """Return the figure that arms are chosen by: validated block efficiency, without validation that of the test prompts."""
    if not math.isnan(arm.validated):
        return arm.validated
    return arm.temperatures[0].block_efficiency.value if arm.temperatures else math.nan


def _notes(arms: Sequence[ArmFigures], *, axes: Mapping[str, Sequence[str]], rate: str | None) -> Iterator[str]:
    known = [arm for arm in arms if not math.isnan(chosen_by(arm))]
    if len(known) > 1:
        best = max(known, key=chosen_by)
        prompts = "test" if math.isnan(best.validated) else "validation"
        yield f"highest block efficiency on the {prompts} prompts: {best.name} ({chosen_by(best):.3f})"
    if rate is not None:
        yield from _rates_at_the_edge(known, rate, axes[rate])
    yield from (
        f"{arm.name}: below export.require (seed {run.seed})" for arm in arms for run in arm.runs if not run.accepted
    )


def _rates_at_the_edge(arms: Sequence[ArmFigures], rate: str, values: Sequence[str]) -> Iterator[str]:
    """Yield each setting of the other axes whose best learning rate is the lowest or highest of the grid."""
    groups: dict[tuple[str, ...], list[ArmFigures]] = {}
    for arm in arms:
        others = tuple(f"{axis}={value}" for axis, value in arm.settings.items() if axis != rate)
        groups.setdefault(others, []).append(arm)
    ranked = sorted(values, key=float)
    edges = {ranked[0]: "lowest", ranked[-1]: "highest"}
    for others, group in groups.items():
        highest = max(map(chosen_by, group))
        best, *equal = [arm.settings[rate] for arm in group if chosen_by(arm) == highest]
        if best in edges and not equal:
            yield (
                f"{', '.join([*others, ''])}{rate}={best} is best and the {edges[best]} of the grid: a better one may lie beyond it"
            )


def _changed_inputs(finished: Sequence[Finished]) -> Iterator[str]:
    """Yield the files that changed between two runs: such arms cannot be compared."""
    seen: dict[tuple[str, str], tuple[Any, str]] = {}
    for one in finished:
        for key, read in one.inputs.items():
            if read["digest"] is None:
                continue
            digest, first = seen.setdefault((key, read["path"]), (read["digest"], one.run.folder))
            if digest != read["digest"]:
                yield f"NOT COMPARABLE: {one.run.folder} and {first} read different contents of {key} ({read['path']})"
