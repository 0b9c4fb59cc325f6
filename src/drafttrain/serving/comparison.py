"""Compares a serving engine on the exported files with the evaluator on the drafter folder: token for token, count for count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt
from drafttrain.drafters import Drafter
from drafttrain.environments.environment import ask
from drafttrain.eval.parity import Parity, parity
from drafttrain.eval.statistics import ratio_difference
from drafttrain.serving.engines import DecodedPrompt, Job, ServingEngine, Use
from drafttrain.serving.problems import (
    SAMPLED_TEMPERATURE,
    count_problems,
    lossless_problems,
    sampling_problems,
    target_problems,
    tolerance_of,
)
from drafttrain.serving.reference import evaluator_side
from drafttrain.serving.sides import Counts, Side, sum_counts
from drafttrain.target_model import Target


@dataclass(frozen=True)
class Comparison:
    """An engine compared with the evaluator."""

    engine: str
    version: str
    repaired: tuple[str, ...]
    dtype: str
    num_prompts: int
    max_new_tokens: int
    num_draft_tokens: int
    draft: str
    """At temperature > 0, on both sides: sampled or greedy."""
    lossless: Parity
    """The engine's output with the drafter against its own without."""
    same_target: Parity
    """The engine's output without a drafter against the evaluator's."""
    greedy: dict[str, Counts]
    """By side, `engine` and `evaluator`, on the prompts on which both write the same text with the drafter."""
    num_compared: int
    """Number of these prompts."""
    sampled: dict[str, Counts]
    """By side; empty, as are the fields below, if the engine has no sampled run."""
    difference: dict[str, float]
    """Of the sampled block efficiency, engine minus evaluator."""
    sampled_p_value: float | None
    """Of the hypothesis that both sides accept alike."""
    text_p_value: float | None
    """Of the hypothesis that both sides' sampled texts are equally likely under the target."""
    problems: tuple[str, ...]

    def __str__(self) -> str:
        if self.problems:
            return "FAILED\n" + "\n".join(f"  {problem}" for problem in self.problems)
        theirs, ours = (self.greedy[side] for side in ("engine", "evaluator"))
        greedy = (
            f"passed: {self.lossless}; {theirs.num_drafts} drafts, {theirs.num_draft_tokens} draft tokens, "
            f"{theirs.num_accepted} accepted, the evaluator {ours.num_drafts}, {ours.num_draft_tokens}, {ours.num_accepted}"
            f"{self._compared()}"
        )
        if not self.sampled:
            return f"{greedy}; not run at temperature > 0"
        return (
            f"{greedy}; at temperature {SAMPLED_TEMPERATURE:g} block efficiency {self.sampled['engine'].block_efficiency:.3f}, "
            f"the evaluator {self.sampled['evaluator'].block_efficiency:.3f}"
        )

    def _compared(self) -> str:
        """Return on how many prompts the counters were compared, unless on all."""
        if self.num_compared == self.num_prompts:
            return ""
        return f" (on the {self.num_compared} of {self.num_prompts} prompts with equal texts)"

    def json(self) -> dict[str, Any]:
        """Return what engine.json holds."""
        return {
            "engine": self.engine,
            "version": self.version,
            "repaired": list(self.repaired),
            "verdict": "failed" if self.problems else "passed",
            "problems": list(self.problems),
            "dtype": self.dtype,
            "num_prompts": self.num_prompts,
            "max_new_tokens": self.max_new_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "draft": self.draft,
            "lossless": self.lossless.json() | {"text": str(self.lossless)},
            "same_target": self.same_target.json() | {"text": str(self.same_target)},
            "greedy": {side: counts.json() for side, counts in self.greedy.items()},
            "num_compared": self.num_compared,
            "sampled": self._sampled_json() if self.sampled else None,
        }

    def _sampled_json(self) -> dict[str, Any]:
        return {side: counts.json() for side, counts in self.sampled.items()} | {
            "temperature": SAMPLED_TEMPERATURE,
            "difference": self.difference,
            "p_value": self.sampled_p_value,
            "text_p_value": self.text_p_value,
        }


def plain_output(engine: ServingEngine, job: Job) -> list[DecodedPrompt]:
    """Return the engine's greedy output without a drafter; all drafters of a target can be compared with it."""
    request = engine.request(replace(job, temperatures=[0.0]), None)
    (greedy,) = engine.decoded(ask(engine.environment, engine.worker, request))
    return greedy


def compare_with_engine(
    engine: ServingEngine,
    exported: Path,
    drafter: Drafter,
    target: Target,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    num_draft_tokens: int,
    plain: Sequence[DecodedPrompt] | None = None,
) -> Comparison:
    """Decode prompts in an engine and with the evaluator, and compare.

    Args:
        exported: The folder that the engine loads.
        drafter: What the evaluator drafts with: read from the folder that was exported.
        target: The target that the drafter stands on; `job.target` is its folder.
        plain: The engine's output without a drafter, if it is known already.

    Raises:
        EngineError: The engine is not installed, or failed.
    """
    drafter.draft = engine.draft(drafter.kind, drafter.draft)
    plain = plain if plain is not None else plain_output(engine, job)
    job = job if engine.samples else replace(job, temperatures=[0.0])
    use = Use(str(exported.resolve()), drafter.kind, num_draft_tokens, drafter.draft)
    answer = ask(engine.environment, engine.worker, engine.request(job, use))
    conventions = engine.conventions(job.target)
    return compare(
        Side(plain, *engine.decoded(answer)),
        evaluator_side(target, drafter, prompts, job, num_draft_tokens=num_draft_tokens, conventions=conventions),
        target,
        prompts,
        job,
        engine=engine.name,
        version=answer["version"],
        repaired=tuple(answer.get("repaired", ())),
        num_draft_tokens=num_draft_tokens,
        draft=drafter.draft,
    )


def compare(
    theirs: Side,
    ours: Side,
    target: Target,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    engine: str,
    version: str,
    repaired: tuple[str, ...],
    num_draft_tokens: int,
    draft: str,
) -> Comparison:
    """Compare what an engine decoded with what the evaluator decoded.

    Args:
        engine: Its name, for messages.
    """
    lossless = parity(generations(prompts, theirs.plain), generations(prompts, theirs.greedy), target)
    same_target = parity(generations(prompts, ours.plain), generations(prompts, theirs.plain), target)
    # The evaluator's own text with the drafter may differ from its plain one at a near tie, so equal plain texts are not enough.
    pairs = zip(theirs.greedy, ours.greedy, strict=True)
    comparable = [number for number, (a, b) in enumerate(pairs) if list(a.tokens) == list(b.tokens)]
    greedy = {"engine": theirs.greedy, "evaluator": ours.greedy}
    tolerance = tolerance_of(target.model.dtype)
    problems = [
        *lossless_problems(lossless, engine, tolerance),
        *target_problems(same_target, engine),
        *count_problems(greedy, prompts, comparable, engine, tolerance),
    ]
    sums: dict[str, Counts] = {}
    difference: dict[str, float] = {}
    p_value = text_p_value = None
    if theirs.sampled:
        sampled = {"engine": theirs.sampled, "evaluator": ours.sampled}
        sums = {side: sum_counts(many, num_draft_tokens) for side, many in sampled.items()}
        difference, p_value = _acceptance_difference(theirs.sampled, ours.sampled)
        likelihoods = [_log_likelihoods(target, prompts, many) for many in sampled.values()]
        text_p_value = _p_value(*likelihoods)
        problems += sampling_problems(sums, p_value, likelihoods, text_p_value, engine)
    return Comparison(
        engine=engine,
        version=version,
        repaired=repaired,
        dtype=job.dtype,
        num_prompts=len(prompts),
        max_new_tokens=job.max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        draft=draft,
        lossless=lossless,
        same_target=same_target,
        greedy={
            side: sum_counts([many[number] for number in comparable], num_draft_tokens) for side, many in greedy.items()
        },
        num_compared=len(comparable),
        sampled=sums,
        difference=difference,
        sampled_p_value=p_value,
        text_p_value=text_p_value,
        problems=tuple(problems),
    )


def generations(prompts: Sequence[Prompt], decoded: Sequence[DecodedPrompt]) -> list[Generation]:
    """Return outputs as `parity` takes them."""
    return [
        Generation(prompt.id, prompt.domain, prompt.tokens, list(one.tokens), [], 0.0, 0.0, 0.0, 0.0)
        for prompt, one in zip(prompts, decoded, strict=True)
    ]


def _acceptance_difference(
    engine: Sequence[DecodedPrompt], evaluator: Sequence[DecodedPrompt]
) -> tuple[dict[str, float], float]:
    """Return the difference of accepted draft tokens a round, engine minus evaluator, and its p-value over prompts.

    Texts that ended before any draft say nothing about acceptance and are left out.
    """
    both = [(a, b) for a, b in zip(engine, evaluator, strict=True) if a.num_drafts and b.num_drafts]
    if not both:
        return {}, 1.0
    engine, evaluator = zip(*both, strict=True)
    parts = [([one.num_accepted for one in side], [one.num_drafts for one in side]) for side in (engine, evaluator)]
    found = ratio_difference(*parts)
    return found.json(), found.p_value


@torch.no_grad()
def _log_likelihoods(target: Target, prompts: Sequence[Prompt], decoded: Sequence[DecodedPrompt]) -> list[float]:
    """Return the mean log-likelihood of the tokens of each text under the target at the sampled temperature."""
    found = []
    for prompt, one in zip(prompts, decoded, strict=True):
        tokens = torch.tensor([[*prompt.tokens, *one.tokens]], device=target.device)
        # Padding rows included: an engine that does not know them as padding may sample them.
        logits_NV = target.model(tokens).logits[0, len(prompt.tokens) - 1 : -1]
        log_probs_NV = (logits_NV.float() / SAMPLED_TEMPERATURE).log_softmax(dim=-1)
        found.append(float(log_probs_NV.gather(1, tokens[0, len(prompt.tokens) :, None]).mean()))
    return found


def _p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p-value of the hypothesis that two figures have the same mean over the same prompts."""
    ones = [1] * len(first)
    return ratio_difference((first, ones), (second, ones)).p_value
