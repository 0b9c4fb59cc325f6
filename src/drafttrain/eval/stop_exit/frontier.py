"""A frontier: accepted completions against layers run, at several thresholds, beside the whole target, fixed exits and chance. LOSSY."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafttrain.core.calibration import Calibration, calibration
from drafttrain.core.console import progress
from drafttrain.core.proposals import Exactness
from drafttrain.core.provenance import provenance
from drafttrain.eval.interval import Interval
from drafttrain.eval.statistics import ratio_interval, share_difference, share_interval
from drafttrain.eval.stop_exit.classifier import Classifiers
from drafttrain.eval.stop_exit.completer import Completer, Completion
from drafttrain.eval.stop_exit.controllers import ByChance, Controller, FixedLayer, Thresholds, Whole
from drafttrain.eval.stop_exit.labels import Action, LabelledRows
from drafttrain.eval.stop_exit.lines import Case, Lines

WHOLE = "whole target"


@dataclass(frozen=True)
class Point:
    """One way to complete the lines. All shares are of cases."""

    name: str
    exit: float | None
    """Thresholds; None: it has none."""
    stop: float | None
    finished: Interval
    """Completions that were not stopped."""
    accepted: Interval
    """Completions that are the true rest of the line."""
    accepted_less_whole: Interval
    """The same, less that of the whole target, paired."""
    same_as_whole: Interval
    """Completions that are those of the whole target."""
    layer_passes: Interval
    """Calls of a block, over those of the whole target."""
    layer_rows: Interval
    """Tokens through blocks, over those of the whole target."""
    bytes_read: Interval
    """Of all calls but that of the prompt, over those of the whole target."""
    passes_per_token: Interval
    """Calls of a block for a written token, with those of stopped completions."""
    exits: Mapping[int, int]
    """Exits by layer."""
    stops: Mapping[int, int]


@dataclass(frozen=True)
class Step:
    """The controller at one pair of thresholds, and chance at its rates."""

    controller: Point
    random: Point
    accepted_less_random: Interval


@dataclass(frozen=True)
class Figures:
    """A layer's classifier on labelled positions of the measured texts."""

    layer: int
    rows: int
    shares: Mapping[str, float]
    """Of the labels."""
    stop: Calibration
    """The chance to stop against whether that was the label."""
    exit: Calibration | None
    """The chance to exit, of positions without the label STOP; None: there are none."""


@dataclass(frozen=True)
class StopExitFrontier:
    """The content of stop_exit.json."""

    exactness: str
    target: str
    num_layers: int
    layers: Sequence[int]
    num_cases: int
    whole: Point
    fixed: Sequence[Point]
    steps: Sequence[Step]
    classifiers: Sequence[Figures]
    provenance: Mapping[str, Any] = field(default_factory=provenance)

    @property
    def points(self) -> list[Point]:
        """All points, baselines first."""
        return [self.whole, *self.fixed, *(one for step in self.steps for one in (step.controller, step.random))]


def measure(
    completer: Completer,
    cases: Sequence[Case],
    lines: Lines,
    classifiers: Classifiers,
    *,
    exit: Sequence[float],
    stop: Sequence[float],
    held: LabelledRows,
    target: str,
    num_layers: int,
) -> StopExitFrontier:
    """Complete all cases with every controller.

    Args:
        held: Labelled positions of the measured texts.
        target: Its name in the result.
    """
    layers = classifiers.chosen
    pairs = [(one, other) for other in sorted(stop, reverse=True) for one in sorted(exit, reverse=True)]
    # A controller that never acts is the whole target.
    pairs = [pair for pair in pairs if min(pair) <= 1]
    with progress("completing", total=(1 + len(layers) + 2 * len(pairs)) * len(cases), unit="lines") as bar:

        def run(controller: Controller) -> list[Completion]:
            found = []
            for case in cases:
                found.append(completer.complete(case, controller))
                bar.advance(1)
            return found

        whole = run(Whole())

        def point(name: str, found: list[Completion], exit: float | None = None, stop: float | None = None) -> Point:
            return _point(name, found, whole, cases, lines, exit=exit, stop=stop)

        fixed = [point(f"exit after {layer}", run(FixedLayer(layer))) for layer in layers]
        steps = []
        for one, other in pairs:
            own = run(Thresholds(classifiers, one, other))
            drawn = run(ByChance(rates(own)))
            steps.append(
                Step(
                    point(f"exit {_shown(one)}, stop {_shown(other)}", own, one, other),
                    point("random, same rates", drawn),
                    share_difference(*(_accepted(some, cases, lines) for some in (own, drawn))).interval(),
                )
            )
    return StopExitFrontier(
        exactness=Exactness.LOSSY.value,
        target=target,
        num_layers=num_layers,
        layers=layers,
        num_cases=len(cases),
        whole=point(WHOLE, whole),
        fixed=fixed,
        steps=steps,
        classifiers=[figures(classifiers, held, layer) for layer in layers],
    )


def rates(completions: Sequence[Completion]) -> dict[int, tuple[float, float]]:
    """Return, by layer, the shares of its decisions that stopped and that exited."""
    found = {}
    for layer in completions[0].decisions:
        counts = [sum(one.decisions[layer][action] for one in completions) for action in Action]
        total = max(1, sum(counts))
        found[layer] = (counts[Action.STOP] / total, counts[Action.EXIT] / total)
    return found


def figures(classifiers: Classifiers, held: LabelledRows, layer: int) -> Figures:
    """Return how well a layer's classifier predicts the labels."""
    labels_N = held.labels_N[layer]
    stop_N, exit_N = classifiers.chances(layer, held.features_ND[layer])
    stops_N = labels_N == Action.STOP
    shares = {action.name: float((labels_N == action).double().mean()) for action in Action}
    open_N = ~stops_N
    return Figures(
        layer,
        len(labels_N),
        shares,
        calibration(stop_N.numpy(), stops_N.numpy()),
        calibration(exit_N[open_N].numpy(), (labels_N[open_N] == Action.EXIT).numpy()) if bool(open_N.any()) else None,
    )


def _shown(threshold: float) -> str:
    return "never" if threshold > 1 else f"{threshold:g}"


def _accepted(completions: Sequence[Completion], cases: Sequence[Case], lines: Lines) -> list[bool]:
    return [
        one.stopped_at is None and lines.are_same(one.tokens, case.truth)
        for one, case in zip(completions, cases, strict=True)
    ]


def _point(
    name: str,
    found: Sequence[Completion],
    whole: Sequence[Completion],
    cases: Sequence[Case],
    lines: Lines,
    *,
    exit: float | None,
    stop: float | None,
) -> Point:
    ones = [1] * len(cases)
    accepted, by_whole = _accepted(found, cases, lines), _accepted(whole, cases, lines)
    same = [
        one.stopped_at is None and lines.are_same(one.tokens, other.tokens)
        for one, other in zip(found, whole, strict=True)
    ]

    def of_whole(count: Any) -> Interval:
        return ratio_interval([count(one) for one in found], [count(one) for one in whole])

    return Point(
        name=name,
        exit=exit,
        stop=stop,
        finished=share_interval([one.stopped_at is None for one in found], ones),
        accepted=share_interval(accepted, ones),
        accepted_less_whole=share_difference(accepted, by_whole).interval(),
        same_as_whole=share_interval(same, ones),
        layer_passes=of_whole(lambda one: one.layer_passes),
        layer_rows=of_whole(lambda one: one.layer_rows),
        bytes_read=of_whole(lambda one: sum(event.bytes_read for event in one.forwards if not event.prefill)),
        passes_per_token=ratio_interval([one.layer_passes for one in found], [len(one.tokens) for one in found]),
        exits={layer: sum(one.decisions[layer][Action.EXIT] for one in found) for layer in found[0].decisions},
        stops={layer: sum(one.decisions[layer][Action.STOP] for one in found) for layer in found[0].decisions},
    )
