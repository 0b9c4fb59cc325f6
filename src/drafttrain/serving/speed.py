"""Speed of a serving engine with a drafter and without, by the engine's own clock, beside the evaluator's on the same prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from drafttrain.core.console import say
from drafttrain.core.texts import Prompt
from drafttrain.drafters import Drafter
from drafttrain.environments.environment import ask
from drafttrain.eval.interval import Interval
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.parity import Parity, parity
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.speed import Speed, measure
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.serving.comparison import generations
from drafttrain.serving.engines import DecodedPrompt, Job, ServingEngine, Use
from drafttrain.serving.reference import up_to_end
from drafttrain.serving.sides import sum_counts
from drafttrain.target_model import Target


@dataclass(frozen=True)
class SideSpeed:
    """Greedy tokens per second of one side, one prompt at a time."""

    without_drafter: float
    with_drafter: float
    speedup: Interval
    block_efficiency: float
    num_threads: int


@dataclass(frozen=True)
class EngineSpeed:
    """Speed of an engine beside the evaluator's."""

    engine: SideSpeed
    evaluator: SideSpeed
    after_prompt: Interval
    """Speed-up of the engine without the time up to the first token."""
    of_cpu: Interval
    """Speed-up of the engine in CPU seconds of its process."""
    num_pairs: int
    num_prompts: int
    texts: Parity
    """Of the timed processes: the output with the drafter against that without."""

    def __str__(self) -> str:
        ours, theirs = self.evaluator, self.engine
        return (
            f"{theirs.with_drafter:.1f} tokens/s with the drafter, {theirs.without_drafter:.1f} without, "
            f"speed-up {theirs.speedup.text()} ({self.num_pairs} processes each, threads: {theirs.num_threads}); "
            f"after the prompt {self.after_prompt.text()}, in CPU seconds {self.of_cpu.text()}; texts "
            f"{self.texts.short()}; the evaluator {ours.with_drafter:.1f} and {ours.without_drafter:.1f}, "
            f"speed-up {ours.speedup.text()}"
        )

    def json(self) -> dict[str, Any]:
        """Return what engine.json holds."""
        return asdict(self)


def measure_speed(
    engine: ServingEngine,
    job: Job,
    use: Use,
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    *,
    outputs: Sequence[Sequence[int]],
    num_pairs: int,
) -> EngineSpeed:
    """Time an engine with a drafter and without in turns, each time in a new process, then the evaluator.

    Args:
        target: The target that the drafter drafts for: with its adapters.
        settings: Of the evaluator; draft length, tokens and temperature are those of the engine.
        outputs: What the target writes; where a text ends, the engine is asked for no more.

    Raises:
        EngineError: The engine is not installed, or failed.
    """
    ends = frozenset(target.eos_token_ids)
    lengths = [len(up_to_end(text, ends)) for text in outputs]
    job = replace(job, temperatures=[0.0], lengths=lengths, as_served=True)
    with_drafter, alone = _timed_in_turns(engine, job, use, num_pairs)
    same = replace(
        settings,
        length=FixedLengthSettings(use.num_draft_tokens),
        max_new_tokens=job.max_new_tokens,
        temperatures=[0.0],
        batch_size=1,
    )
    texts = parity(generations(prompts, alone[0]), generations(prompts, with_drafter[0]), target)
    return compared(with_drafter, alone, measure(drafter, target, prompts, same), texts, use.num_draft_tokens)


def compared(
    with_drafter: Sequence[Sequence[DecodedPrompt]],
    alone: Sequence[Sequence[DecodedPrompt]],
    evaluator: Speed,
    texts: Parity,
    num_draft_tokens: int,
) -> EngineSpeed:
    """Return the speeds of an engine's processes and of the evaluator.

    Args:
        with_drafter, alone: By process, then by prompt.
    """
    drafted, plain = ([_mean(same) for same in zip(*runs, strict=True)] for runs in (with_drafter, alone))
    return EngineSpeed(
        engine=SideSpeed(
            without_drafter=_rate(plain),
            with_drafter=_rate(drafted),
            speedup=_speedup(drafted, plain, lambda one: one.seconds),
            block_efficiency=sum_counts(drafted, num_draft_tokens).block_efficiency,
            num_threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
        ),
        evaluator=SideSpeed(
            without_drafter=evaluator.without_drafter,
            with_drafter=evaluator.with_drafter,
            speedup=evaluator.speedup,
            block_efficiency=evaluator.block_efficiency,
            num_threads=torch.get_num_threads(),
        ),
        after_prompt=_speedup(drafted, plain, lambda one: one.seconds - one.prompt_seconds),
        of_cpu=_speedup(drafted, plain, lambda one: one.cpu_seconds),
        num_pairs=len(with_drafter),
        num_prompts=len(plain),
        texts=texts,
    )


def _timed_in_turns(
    engine: ServingEngine, job: Job, use: Use, num_pairs: int
) -> tuple[list[list[DecodedPrompt]], list[list[DecodedPrompt]]]:
    """Return what processes with the drafter and processes without decoded."""
    runs: dict[bool, list[list[DecodedPrompt]]] = {True: [], False: []}
    for number, drafts in enumerate([True, False] * num_pairs):
        say(
            f"{engine.name}: timing process {number + 1} of {2 * num_pairs}, {'with' if drafts else 'without'} the drafter"
        )
        request = engine.request(job, use if drafts else None)
        (greedy,) = engine.decoded(ask(engine.environment, engine.worker, request))
        runs[drafts].append(greedy)
    return runs[True], runs[False]


def _mean(runs: Sequence[DecodedPrompt]) -> DecodedPrompt:
    """Return a prompt with the means of its times; tokens and counters are those of the first run."""
    names = ("seconds", "prompt_seconds", "cpu_seconds")
    return replace(runs[0], **{name: sum(getattr(one, name) for one in runs) / len(runs) for name in names})


def _rate(decoded: Sequence[DecodedPrompt]) -> float:
    return sum(len(one.tokens) for one in decoded) / sum(one.seconds for one in decoded)


def _speedup(
    with_drafter: Sequence[DecodedPrompt], alone: Sequence[DecodedPrompt], time: Callable[[DecodedPrompt], float]
) -> Interval:
    """Return the tokens per unit of time with the drafter over those without."""
    parts = [([len(one.tokens) for one in side], [time(one) for one in side]) for side in (with_drafter, alone)]
    return ratio_of_ratios(*parts).interval()
