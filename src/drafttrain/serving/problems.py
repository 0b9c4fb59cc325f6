"""What fails in a comparison of an engine with the evaluator: output, counters, or acceptance and text at temperature > 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from drafttrain.core.texts import Prompt
from drafttrain.eval.parity import Parity
from drafttrain.serving.engines import DecodedPrompt
from drafttrain.serving.sides import Counts

SAMPLED_TEMPERATURE = 1.0
LOWEST_P_VALUE = 0.01
"""Below this p-value, engine and evaluator are judged to accept or write differently."""

TOLERANCE = {torch.float32: 0.0}
"""Relative difference of the counters that is allowed at temperature 0, by type; types without an entry get OTHER_TOLERANCE."""

OTHER_TOLERANCE = 0.02


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
    """Return a problem if the greedy counters differ: in their sums, or without tolerance in any prompt.

    Args:
        both: By side, `engine` and `evaluator`.
        comparable: Places of the prompts on which all outputs agree.
    """
    if not any(both["evaluator"][i].num_drafts for i in comparable):
        return [f"{engine}: no prompt is left whose counters can be compared"]
    if not any(both["engine"][i].num_drafts for i in comparable):
        return [f"{engine} did not draft: its counters are zero"]
    if tolerance:
        efficiencies = [
            1 + sum(side[i].num_accepted for i in comparable) / sum(side[i].num_drafts for i in comparable)
            for side in both.values()
        ]
        if abs(efficiencies[0] / efficiencies[1] - 1) <= tolerance:
            return []
        return [
            f"{engine}: block efficiency {efficiencies[0]:.3f}, evaluator {efficiencies[1]:.3f}: "
            f"they differ by more than {tolerance:.0%}"
        ]
    wrong = [i for i in comparable if _counters(both["engine"][i]) != _counters(both["evaluator"][i])]
    if not wrong:
        return []
    theirs, ours = (_counters(both[side][wrong[0]]) for side in ("engine", "evaluator"))
    return [
        f"{engine} drafts differently from the evaluator in {len(wrong)} of {len(comparable)} prompts; in "
        f"{prompts[wrong[0]].id!r} its drafts, draft tokens, accepted and accepted by position are {theirs}, the evaluator's {ours}"
    ]


def sampling_problems(
    sums: Mapping[str, Counts],
    p_value: float,
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
    if p_value < LOWEST_P_VALUE:
        found.append(
            f"at temperature {SAMPLED_TEMPERATURE:g} {engine} accepts differently from the evaluator: block efficiency "
            f"{sums['engine'].block_efficiency:.3f}, evaluator {sums['evaluator'].block_efficiency:.3f}, p = {p_value:.2g}"
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
