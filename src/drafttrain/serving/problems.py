"""What fails in a comparison of an engine with the evaluator: output, counters, or acceptance and text at temperature > 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from drafttrain.core.texts import Prompt
from drafttrain.eval.interval import p_value
from drafttrain.eval.parity import Parity
from drafttrain.eval.statistics import ratio_difference
from drafttrain.serving.engines import DecodedPrompt
from drafttrain.serving.sides import Counts

SAMPLED_TEMPERATURE = 1.0
LOWEST_P_VALUE = 0.01
"""Below this p-value, engine and evaluator are judged to accept or write differently."""

TOLERANCE = {torch.float32: 0.0}
"""Relative difference of the counters that is allowed at temperature 0, by type; types without an entry get OTHER_TOLERANCE."""

OTHER_TOLERANCE = 0.02

WIDEST = 0.1
"""Where rounding changes drafts: half the interval of that difference, above which the prompts are too few to say anything."""


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference of the counters that rounding in a type may cause."""
    return TOLERANCE.get(dtype, OTHER_TOLERANCE)


def lossless_problems(found: Parity, engine: str, tolerance: float) -> list[str]:
    """Return a problem if the engine's output with the drafter differs from its output without, unless rounding explains it."""
    if found.exact or (tolerance > 0 and found.lossless):
        return []
    return [f"the output of {engine} with the drafter differs from its output without: {found}"]


def target_problems(found: Parity, engine: str) -> list[str]:
    """Return a problem if the engine's target writes another text than the evaluator's, except at near ties."""
    if found.lossless:
        return []
    return [f"the output of {engine} without a drafter differs from that of the evaluator's target: {found}"]


def count_problems(
    both: Mapping[str, Sequence[DecodedPrompt]],
    prompts: Sequence[Prompt],
    comparable: Sequence[int],
    engine: str,
    tolerance: float,
) -> list[str]:
    """Return a problem if the greedy counters differ: beyond tolerance and chance, or without tolerance in any prompt.

    Args:
        both: By side, `engine` and `evaluator`.
        comparable: Places of the prompts on which both sides write the same text with the drafter.
    """
    if not any(both["evaluator"][i].num_drafts for i in comparable):
        return [f"{engine}: no prompt is left whose counters can be compared: {_differing(prompts, comparable)}"]
    if not any(both["engine"][i].num_drafts for i in comparable):
        return [f"{engine} did not draft: its counters are zero"]
    if tolerance:
        return _difference_problems(both, prompts, comparable, engine, tolerance)
    wrong = [i for i in comparable if _counters(both["engine"][i]) != _counters(both["evaluator"][i])]
    if not wrong:
        return []
    theirs, ours = (_counters(both[side][wrong[0]]) for side in ("engine", "evaluator"))
    return [
        f"{engine} drafts differently from the evaluator in {len(wrong)} of {len(comparable)} prompts; in "
        f"{prompts[wrong[0]].id!r} its drafts, draft tokens, accepted and accepted by position are {theirs}, the evaluator's {ours}"
    ]


def _difference_problems(
    both: Mapping[str, Sequence[DecodedPrompt]],
    prompts: Sequence[Prompt],
    comparable: Sequence[int],
    engine: str,
    tolerance: float,
) -> list[str]:
    """Return a problem if block efficiency differs, or if too little is equal to say so.

    On equal text rounding still changes drafts at near ties of the drafter, in both directions.
    """
    sums = [
        ([side[i].num_accepted for i in comparable], [side[i].num_drafts for i in comparable]) for side in both.values()
    ]
    theirs, ours = (1 + sum(accepted) / sum(drafts) for accepted, drafts in sums)
    if abs(theirs / ours - 1) <= tolerance:
        return []
    found = ratio_difference(*sums)
    known = f"{engine}: block efficiency {theirs:.3f}, evaluator {ours:.3f}"
    where = f"on the {len(comparable)} of {len(prompts)} prompts with equal texts"
    if found.p_value < LOWEST_P_VALUE:
        return [
            f"{known}: they differ by more than {tolerance:.0%} and more than by chance ({p_value(found.p_value)}) {where}"
        ]
    if not (found.high - found.low) / 2 <= WIDEST * ours:
        return [f"{known}: {where} a difference cannot be told from chance: {_differing(prompts, comparable)}"]
    return []


def _differing(prompts: Sequence[Prompt], comparable: Sequence[int]) -> str:
    """Return how many texts differ, and what to do."""
    return (
        f"{len(prompts) - len(comparable)} of {len(prompts)} texts differ. Raise export.verify_prompts, lower "
        "export.verify_tokens, or compare exactly with target.dtype=float32"
    )


def sampling_problems(
    sums: Mapping[str, Counts],
    accepted_p_value: float,
    likelihoods: Sequence[Sequence[float]],
    text_p_value: float,
    engine: str,
) -> list[str]:
    """Return the problems if acceptance or text at temperature > 0 differs from the evaluator's beyond chance.

    Args:
        likelihoods: Mean log-likelihood of each text under the target: the engine's texts, then the evaluator's.
    """
    found = []
    if sums["evaluator"].num_drafts and not sums["engine"].num_drafts:
        found.append(f"at temperature {SAMPLED_TEMPERATURE:g} {engine} did not draft: its counters are zero")
    if accepted_p_value < LOWEST_P_VALUE:
        found.append(
            f"at temperature {SAMPLED_TEMPERATURE:g} {engine} accepts differently from the evaluator: block efficiency "
            f"{sums['engine'].block_efficiency:.3f}, evaluator {sums['evaluator'].block_efficiency:.3f}, p = {accepted_p_value:.2g}"
        )
    if text_p_value < LOWEST_P_VALUE:
        means = [sum(values) / len(values) for values in likelihoods]
        found.append(
            f"at temperature {SAMPLED_TEMPERATURE:g} {engine} does not sample from the target's distribution: mean log-likelihood "
            f"of a token {means[0]:.2f}, of the evaluator's text {means[1]:.2f}, p = {text_p_value:.2g}"
        )
    return found


def _counters(one: DecodedPrompt) -> tuple[int, int, int, list[int]]:
    """Return the counters of a prompt, without positions at the end where nothing was accepted."""
    accepted_at = list(one.accepted_at)
    while accepted_at and accepted_at[-1] == 0:
        accepted_at.pop()
    return one.num_drafts, one.num_draft_tokens, one.num_accepted, accepted_at
