"""Validation of a drafter in training: the texts, the target's outputs on them, and the estimate of block efficiency.

The texts are what the target writes after the validation prompts; every draft length is estimated on them by replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from drafttrain.core.console import progress
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import TokenCount, continuations
from drafttrain.data_gen.states import states
from drafttrain.data_gen.stored.validation_target import cached_continuations, cached_target
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.interval import Interval
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.metrics import counts_of, totals_of
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.repetition import tokens_before_repetition
from drafttrain.eval.replay import ReplayRows, Text, expected_rounds, mean_bound, replay_rows
from drafttrain.eval.slices import part_of
from drafttrain.eval.statistics import ratio_interval
from drafttrain.pipeline.data import contaminated_prompts
from drafttrain.pipeline.evaluating import check_lengths
from drafttrain.pipeline.run import Run
from drafttrain.target_model import Target


class Validation:
    """What a run validates its drafter with; each part is made once, when it is first asked for.

    Args:
        needs: Returns what the drafter reads of the target.
    """

    def __init__(self, run: Run, needs: Callable[[], TargetNeeds]) -> None:
        self._run = run
        self._needs = needs

    @functools.cached_property
    def sampling(self) -> Sampling:
        """How the target draws the texts: as at the first temperature of the evaluation."""
        settings = self._run.recipe.eval
        temperature = settings.temperatures[0]
        return Sampling() if temperature == 0 else Sampling(temperature, settings.top_p, settings.top_k)

    @functools.cached_property
    def texts(self) -> list[Text]:
        """The validation prompts with the target's continuations, cut before they repeat themselves."""
        run, settings = self._run, self._run.recipe.eval
        prompts = read_prompts(
            settings.validation_prompts,
            run.tokenizer,
            prompt_tokens=settings.prompt_tokens,
            images=run.images,
            dropped=contaminated_prompts(run, settings.validation_prompts),
            limit=run.recipe.train.eval_prompts,
        )
        # Validation asks no later questions.
        check_lengths(run.target, [replace(prompt, questions=()) for prompt in prompts], settings)
        tasks = [Task(prompt.id, list(prompt.tokens), self.sampling, prompt.images) for prompt in prompts]
        written = self._written(tasks)
        if settings.repetition_ngram:
            written = [new[: max(1, tokens_before_repetition(new, ngram=settings.repetition_ngram))] for new in written]
        return [Text(task.id, task.prompt, new, task.images) for task, new in zip(tasks, written, strict=True)]

    def _written(self, tasks: list[Task]) -> list[list[int]]:
        run = self._run
        new = run.recipe.eval.max_new_tokens
        with progress("writing validation texts", total=len(tasks), unit="texts") as bar:
            limits: Any = {
                "max_new_tokens": new,
                "seed": run.recipe.seed,
                "written": TokenCount(bar, max_new_tokens=new),
            }
            if run.placement == "replicated":
                texts = continuations(tasks, run.target, **limits)
            else:
                source = states.build(run.recipe.data.states)
                texts = cached_continuations(run.folder.validation / "texts.json", tasks, run.target, source, **limits)
            bar.advance(len(texts))
        return texts

    @functools.cached_property
    def target(self) -> Target:
        """The target itself if it is replicated, else its stored outputs on the validation texts.

        All processes together run a sharded target: each must have read this once before one reads it alone.
        """
        run, data = self._run, self._run.recipe.data
        if run.placement == "replicated":
            return run.target
        return cached_target(
            run.folder.validation,
            [[*text.prompt, *text.new] for text in self.texts],
            run.target,
            needs=self._needs(),
            dtype=data.cache_dtype,
            max_gb=data.max_cache_gb,
        )

    def release(self) -> None:
        """Release the target; the texts stay."""
        self.__dict__.pop("target", None)

    def estimator(self) -> Callable[[Any], Mapping[str, Any]]:
        """Return the function that estimates a drafter's block efficiency by replay on the validation texts."""
        settings, texts, target = self._run.recipe.eval, self.texts, self.target
        tokens = sum(len(text.new) for text in texts)
        length = settings.length.chain_length
        lengths = sorted({*settings.replay_lengths, length})

        def estimate(drafter: Any) -> dict[str, Any]:
            if not drafter.replayable:
                return self._decoded(drafter)
            with drafter.adapting(target) as served:
                rows = replay_rows(served, drafter, texts, self.sampling, num_depths=max(lengths))
            by_length = {k: replayed_efficiency(rows, k) for k in lengths}
            alpha = sum(float(r.acceptance_T.sum()) for r in rows) / tokens
            most = (
                ""
                if drafter.vocabulary is None
                else f" (at most {mean_bound(rows):.3f}, the target's probability of the draft vocabulary)"
            )
            efficiencies = "  ".join(f"K={k}: {found.value:.2f}" for k, found in by_length.items())
            return {
                "block_efficiency": by_length[length].value,
                "block_efficiency_low": by_length[length].low,
                "block_efficiency_high": by_length[length].high,
                "alpha": alpha,
                "message": f"block efficiency by replay {efficiencies}  alpha {alpha:.3f}{most}",
            }

        return estimate

    def _decoded(self, drafter: Any) -> dict[str, Any]:
        """Return the figures of a drafter whose drafts depend on the rounds before: the validation prompts are decoded with it."""
        settings, target = self._run.recipe.eval, self.target
        prompts = [Prompt(text.id, list(text.prompt), images=text.images) for text in self.texts]
        with drafter.adapting(target) as served:
            engine = Engine(
                served,
                drafter.proposer(served),
                rule=Lossless(),
                policy=FixedLength(FixedLengthSettings(settings.length.chain_length)),
                sampling=self.sampling,
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed,
            )
            size = settings.batch_size
            written = [
                one for start in range(0, len(prompts), size) for one in engine.generate(prompts[start : start + size])
            ]
        counts = [counts_of(one, repetition_ngram=settings.repetition_ngram) for one in written]
        found, totals = ratio_interval(*part_of(counts)), totals_of(counts)
        alpha = totals.acceptance_by_position[0] if totals.acceptance_by_position else 0.0
        return {
            "block_efficiency": found.value,
            "block_efficiency_low": found.low,
            "block_efficiency_high": found.high,
            "alpha": alpha,
            "message": f"block efficiency {found.value:.2f}, decoded; rounds whose first draft token is accepted {alpha:.3f}",
        }


def replayed_efficiency(rows: Sequence[ReplayRows], num_draft_tokens: int) -> Interval:
    """Return the block efficiency of this draft length by replay: new tokens / expected rounds, with its interval over texts."""
    return ratio_interval(
        [len(one.acceptance_T) for one in rows], [expected_rounds(one, num_draft_tokens) for one in rows]
    )
