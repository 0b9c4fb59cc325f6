"""A frontier: one kind of cascade at several values, beside the large model, the small one and random routing. LOSSY.

P = prompts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from drafttrain.core.console import progress
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.generations import ForwardEvent
from drafttrain.core.gpus import gpu_named
from drafttrain.core.proposals import Exactness
from drafttrain.core.provenance import provenance
from drafttrain.core.registry import component_mapping
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.checkers import Checker
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.kinds.random import at_rate
from drafttrain.eval.cascade.router import Decoder, Pair
from drafttrain.eval.cascade.settings import FrontierSettings
from drafttrain.eval.cascade.spans import CascadeGeneration, Unit
from drafttrain.eval.clock import TARGET, Efficiency, roofline_of
from drafttrain.eval.interval import Interval
from drafttrain.eval.quality import Agreement, agreement, solved
from drafttrain.eval.statistics import ratio_interval, share_difference, share_interval

LARGE, SMALL = "large alone", "small alone"


@dataclass(frozen=True)
class Point:
    """One way to write the texts: its quality and its cost."""

    name: str
    settings: Mapping[str, Any]
    by_large: Interval
    """Share of the new tokens that the large model wrote."""
    solved: Interval | None
    """Share of prompts; None: no checker."""
    solved_less_large: Interval | None
    """The same, less that of the large model alone, paired over prompts."""
    agreement: Agreement | None
    """With the large model alone; None: texts were sampled."""
    cost: Mapping[str, Interval]
    """Of all calls of both models, prompts included, over that of the large model alone, by what is counted."""
    large_calls: float
    """Calls of the large model for an output, prompts included."""
    small_calls: float
    num_tokens: float
    """New tokens of an output."""
    num_switches: float
    num_taken_back: float
    num_scores: float


@dataclass(frozen=True)
class Step:
    """The cascade at one value, and random routing at its rate."""

    value: float
    cascade: Point
    random: Point
    solved_less_random: Interval | None


@dataclass(frozen=True)
class Frontier:
    """The content of cascade.json."""

    exactness: str
    target: str
    small: str
    kind: str
    swept: str
    draft: Mapping[str, Any] | None
    temperature: float
    num_prompts: int
    axis: str
    """Of `Point.cost`, what the picture and the table show."""
    large: Point
    small_alone: Point
    steps: Sequence[Step]
    provenance: Mapping[str, Any] = field(default_factory=provenance)

    @property
    def points(self) -> list[Point]:
        """All points, baselines first."""
        return [self.large, self.small_alone, *(one for step in self.steps for one in (step.cascade, step.random))]


def measure(
    pair: Pair,
    prompts: Sequence[Prompt],
    settings: FrontierSettings,
    *,
    checker: Checker | None = None,
    small: str = "small model",
) -> Frontier:
    """Decode the prompts at every value and with every baseline.

    Args:
        checker: Decides whether an output solves its prompt; None: quality is agreement with the large model.
        small: Name of the small model in the result.

    Raises:
        DataError: A prompt has no answer that the checker can read; or texts are sampled and there is no checker.
    """
    if checker is None and pair.sampling.temperature > 0:
        raise DataError(
            "eval.checker: null: at temperature above 0 equal texts mean little: give a checker, or eval.temperatures=[0]"
        )
    by = settings.by
    values = sorted(settings.values if settings.values is not None else by.values)
    whole = Unit()
    ends = [(LARGE, at_rate(1.0, whole)), (SMALL, at_rate(0.0, whole))]
    # Drafts are for the large model's spans of a cascade; its baseline is plain decoding.
    alone = replace(pair, draft=None)
    swept = [(f"{by.kind}, {by.swept} {value:g}", by.at(value)) for value in values]
    with progress("decoding", total=(2 + 2 * len(values)) * len(prompts), unit="outputs") as bar:
        runs = _decoded([*((n, s, alone) for n, s in ends), *((n, s, pair) for n, s in swept)], prompts, bar.advance)
        rates = [run.num_by_large / run.num_tokens for run in runs[2:]]
        drawn = [(f"random, rate {rate:.2f}", at_rate(rate, by.unit)) for rate in rates]
        random = _decoded([(n, s, pair) for n, s in drawn], prompts, bar.advance)
    if checker is not None:
        for run in (*runs, *random):
            run.check(checker, pair.target.tokenizer, prompts)
    large = runs[0]
    costs = _costs(settings.cost)
    points = [_point(run, large, pair, costs) for run in (*runs, *random)]
    steps = [
        Step(value, points[2 + i], points[2 + len(values) + i], _difference(runs[2 + i], random[i]))
        for i, value in enumerate(values)
    ]
    return Frontier(
        exactness=Exactness.LOSSY.value,
        target=pair.target.name,
        small=small,
        kind=by.kind,
        swept=by.swept,
        draft=None if pair.draft is None else component_mapping(pair.draft),
        temperature=pair.sampling.temperature,
        num_prompts=len(prompts),
        axis=settings.cost,
        large=points[0],
        small_alone=points[1],
        steps=steps,
    )


@dataclass
class _Run:
    """All outputs of one way."""

    name: str
    settings: Any
    decoder: Decoder
    outputs: list[CascadeGeneration] = field(default_factory=list)
    solved: list[float] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(one.tokens) for one in self.outputs)

    @property
    def num_by_large(self) -> int:
        return sum(one.num_by_large for one in self.outputs)

    def mean(self, count: Callable[[CascadeGeneration], float]) -> float:
        return sum(map(count, self.outputs)) / len(self.outputs)

    def check(self, checker: Checker, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self.solved = solved(checker, tokenizer, prompts, self.outputs)


def _decoded(
    ways: Sequence[tuple[str, Any, Pair]], prompts: Sequence[Prompt], advance: Callable[[int], None]
) -> list[_Run]:
    """Decode every prompt in every way, in turns whose order alternates; the first prompt once more before, to warm up."""
    runs = [_Run(name, settings, decoder_of(settings, pair)) for name, settings, pair in ways]
    for run in runs:
        run.decoder.generate(prompts[0])
    for number, prompt in enumerate(prompts):
        for run in runs if number % 2 == 0 else reversed(runs):
            run.outputs.append(run.decoder.generate(prompt))
            advance(1)
    return runs


def decoder_of(settings: Any, pair: Pair) -> Decoder:
    """Return the decoder of a kind's settings.

    Raises:
        CheckpointError: The kind cannot be drafted for so.
    """
    if why := settings.why_no_draft(pair.draft):
        raise CheckpointError(f"cascade.draft: {why}")
    found: Decoder = cascades.entry(settings.kind).component.create(settings, pair)  # type: ignore[attr-defined]
    return found


def _costs(axis: str) -> dict[str, Callable[[CascadeGeneration], float]]:
    """Return what is counted of an output, by name."""
    found: dict[str, Callable[[CascadeGeneration], float]] = {
        "bytes": lambda one: sum(event.bytes_read for event in one.forwards),
        "flops": lambda one: sum(event.work.flops for event in one.forwards),
        "seconds": lambda one: one.seconds,
    }
    if axis not in found:
        gpu = gpu_named(axis)
        assert gpu is not None, "checked before"
        clock = roofline_of(gpu, Efficiency())
        found[axis] = lambda one: sum(map(clock, one.forwards))
    return found


def _point(run: _Run, large: _Run, pair: Pair, costs: Mapping[str, Callable[[CascadeGeneration], float]]) -> Point:
    outputs = run.outputs
    return Point(
        name=run.name,
        settings=component_mapping(run.settings),
        by_large=ratio_interval([one.num_by_large for one in outputs], [len(one.tokens) for one in outputs]),
        solved=None if run.solved is None else share_interval(run.solved, [1] * len(outputs)),
        solved_less_large=_difference(run, large),
        agreement=agreement(large.outputs, outputs, [one.id for one in outputs])
        if pair.sampling.temperature == 0
        else None,
        cost={
            name: ratio_interval([of(one) for one in outputs], [of(one) for one in large.outputs])
            for name, of in costs.items()
        },
        large_calls=run.mean(lambda one: sum(map(_is_large, one.forwards))),
        small_calls=run.mean(lambda one: sum(not _is_large(event) for event in one.forwards)),
        num_tokens=run.mean(lambda one: len(one.tokens)),
        num_switches=run.mean(lambda one: one.num_switches),
        num_taken_back=run.mean(lambda one: one.num_taken_back),
        num_scores=run.mean(lambda one: len(one.scores)),
    )


def _is_large(event: ForwardEvent) -> bool:
    return event.model == TARGET


def _difference(first: _Run, second: _Run) -> Interval | None:
    if first.solved is None or second.solved is None:
        return None
    return share_difference(first.solved, second.solved).interval()
