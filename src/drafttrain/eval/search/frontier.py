"""Accuracy against target tokens: searches with the same budgets on the same prompts. LOSSY."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.core.console import progress
from drafttrain.core.provenance import provenance
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.checkers import Checker
from drafttrain.eval.interval import Comparison, Interval
from drafttrain.eval.quality import solves
from drafttrain.eval.result import LOSSY
from drafttrain.eval.search.methods import Method, Question, a_star, best_of_n, particle_filter
from drafttrain.eval.search.rewards import Reward
from drafttrain.eval.search.steps import SampledSteps
from drafttrain.eval.statistics import ratio_interval, share_difference, share_interval
from drafttrain.target_model import Target

METHODS: Mapping[str, Method] = {"a_star": a_star, "best_of_n": best_of_n, "particle_filter": particle_filter}


@dataclass(frozen=True)
class SearchPoint:
    """A search with one budget."""

    method: str
    budget: int
    accuracy: Interval
    """Share of prompts that the chosen solution solves."""
    num_tokens: Interval
    """Target tokens of a prompt, those of the prompt itself not counted."""
    num_rewards: Interval
    """Rewards that were asked for, of a prompt."""


@dataclass(frozen=True)
class SearchDifference:
    """A search less another with the same budget, on the same prompts."""

    method: str
    baseline: str
    budget: int
    accuracy: Comparison


@dataclass(frozen=True)
class SearchResult:
    """A frontier of searches."""

    target: str
    num_prompts: int
    points: Sequence[SearchPoint]
    differences: Sequence[SearchDifference]
    provenance: Mapping[str, Any]
    exactness: str = LOSSY


def search_frontier(
    target: Target,
    steps: SampledSteps,
    prompts: Sequence[Prompt],
    reward: Reward,
    checker: Checker,
    budgets: Sequence[int],
    *,
    methods: Mapping[str, Method] = METHODS,
    seed: int = 0,
) -> SearchResult:
    """Search every prompt with every method and budget, and check the chosen solutions.

    Args:
        budgets: Target tokens of each prompt, those of the prompt itself not counted.
        methods: The first one is compared with the others.

    Raises:
        DataError: The reward is no probability.
    """
    found: dict[tuple[str, int], list[tuple[float, int, int]]] = {(m, b): [] for m in methods for b in budgets}
    with progress("searching", total=len(prompts) * len(found), unit="searches") as bar:
        for prompt in prompts:
            text = target.tokenizer.decode(list(prompt.tokens), skip_special_tokens=True)
            for (name, budget), counts in found.items():
                question = Question(prompt, text, steps, reward, budget, seed)
                best = methods[name](question)
                solved = best is not None and solves(checker, prompt, best.text)
                counts.append((float(solved), question.spent, question.num_rewards))
                bar.advance()
    ones = [1] * len(prompts)
    points = [
        SearchPoint(
            name, budget, share_interval(solved, ones), ratio_interval(tokens, ones), ratio_interval(asked, ones)
        )
        for (name, budget), counts in found.items()
        for solved, tokens, asked in [tuple(zip(*counts, strict=True))]
    ]
    first, *others = methods
    differences = [
        SearchDifference(
            first, other, budget, share_difference(_solved(found, first, budget), _solved(found, other, budget))
        )
        for other in others
        for budget in budgets
    ]
    return SearchResult(target.name, len(prompts), points, differences, provenance())


def _solved(found: Mapping[tuple[str, int], Sequence[tuple[float, int, int]]], name: str, budget: int) -> list[float]:
    return [solved for solved, *_ in found[name, budget]]
