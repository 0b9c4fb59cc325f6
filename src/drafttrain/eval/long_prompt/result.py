"""Figures of reduced prompts: one point for each choice and amount, and differences of choices, paired over prompts. All LOSSY."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.eval.interval import Comparison, Interval
from drafttrain.eval.long_prompt.kept import Of
from drafttrain.eval.quality import TaskScore, task_score
from drafttrain.eval.result import LOSSY
from drafttrain.eval.statistics import Part, ratio_difference, ratio_interval


@dataclass(frozen=True)
class PromptCounts:
    """Of one prompt, with what is kept of it."""

    num_kept: int
    num_prompt_tokens: int
    distance: float
    """TVD of the target's distributions with and without the reduction, summed over the tokens of its text."""
    num_tokens: int
    kept_mass: float
    mass: float
    """The target's attention from its text to the prompt before its last token, over all heads, layers and tokens."""
    solved: float | None = None
    """1 if the greedy output solves the prompt; None: there is no checker."""


@dataclass(frozen=True)
class Point:
    """A choice at one amount."""

    choice: str
    of: Of
    amount: str
    """Tokens, or a share of each prompt, as asked for."""
    kept_share: float
    """Of all tokens of the prompts."""
    tvd: Interval
    """Total variation distance to the whole prompt's distributions, mean over the tokens of the target's own texts."""
    recall: Interval
    """Share of the target's attention to the prompt that is to what is kept."""
    task: TaskScore | None = None
    """Of greedy outputs, and less that of the whole prompt."""


@dataclass(frozen=True)
class Difference:
    """A choice by the drafter, less one without it, on the same prompts at the same amount."""

    choice: str
    baseline: str
    amount: str
    tvd: Comparison
    recall: Comparison


@dataclass(frozen=True)
class LongPromptResult:
    """The content of long_prompt.json."""

    drafter: str
    target: str
    prompts: str
    num_prompts: int
    max_new_tokens: int
    choices: Sequence[Mapping[str, Any]]
    points: Sequence[Point]
    differences: Sequence[Difference]
    whole_task: Interval | None
    """Share of prompts that greedy outputs after the whole prompt solve; None: there is no checker."""
    provenance: Mapping[str, Any]
    exactness: str = LOSSY


def point(choice: str, of: Of, amount: str, counts: Sequence[PromptCounts], whole: Sequence[float]) -> Point:
    """Return a point of the frontier.

    Args:
        whole: 1 for every prompt that is solved after the whole prompt; empty: there is no checker.
    """
    solved = [one.solved for one in counts if one.solved is not None]
    return Point(
        choice=choice,
        of=of,
        amount=amount,
        kept_share=sum(one.num_kept for one in counts) / sum(one.num_prompt_tokens for one in counts),
        tvd=ratio_interval(*_distances(counts)),
        recall=ratio_interval(*_masses(counts)),
        task=task_score(solved, whole) if solved else None,
    )


def difference(
    names: tuple[str, str], amount: str, counts: Sequence[PromptCounts], baseline: Sequence[PromptCounts]
) -> Difference:
    """Return the first choice less the second."""
    return Difference(
        *names,
        amount=amount,
        tvd=ratio_difference(_distances(counts), _distances(baseline)),
        recall=ratio_difference(_masses(counts), _masses(baseline)),
    )


def _distances(counts: Sequence[PromptCounts]) -> Part:
    return [one.distance for one in counts], [one.num_tokens for one in counts]


def _masses(counts: Sequence[PromptCounts]) -> Part:
    return [one.kept_mass for one in counts], [one.mass for one in counts]
