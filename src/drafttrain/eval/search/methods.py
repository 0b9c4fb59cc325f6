"""Three searches at the same budget of target tokens: best first by path cost (A*), independent solutions, particles.

A search begins no step after its budget is spent, so it exceeds it by less than one step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drafttrain.core.random import stream
from drafttrain.core.texts import Prompt
from drafttrain.eval.search.rewards import Reward, checked
from drafttrain.eval.search.steps import Steps

CERTAIN = 1e-6
"""Odds of a reward are bounded by those of 1 less this."""


@dataclass
class Question:
    """A prompt, with what a search of it may use and what it has used."""

    prompt: Prompt
    text: str
    """Of the prompt."""
    steps: Steps
    reward: Reward
    budget: int
    """Target tokens, those of the prompt not counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._begin = self.steps.spent
        self._num_draws = 0
        self.num_expansions = 0
        self.num_rewards = 0

    @property
    def spent(self) -> int:
        """Target tokens of this search."""
        return self.steps.spent - self._begin

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.spent >= self.budget

    def expand(self, partial: Any, count: int) -> list[Any]:
        """Return continuations by one step: fewer where the budget is spent before, one at least."""
        self.num_expansions += 1
        found = [self._draw(partial)]
        while len(found) < count and not self.over:
            found.append(self._draw(partial))
        return found

    def rewards(self, partials: Sequence[Any]) -> list[float]:
        """Return the rewards of partial solutions."""
        self.num_rewards += len(partials)
        return checked(self.reward(self.text, [one.text for one in partials]), len(partials))

    def _draw(self, partial: Any) -> Any:
        # Numbered by search: what a method draws does not depend on the searches before it.
        self._num_draws += 1
        return self.steps.next(partial, self._num_draws)


Method = Callable[[Question], Any]
"""Returns the best solution, or the best partial one; None: the budget sufficed for nothing."""


def a_star(question: Question, *, width: int = 4) -> Any:
    """Expand the partial solution of the lowest path cost until it is a whole one.

    The cost is f = g + h with g the sum of 1 - r over the steps before the last one and h = 1 - r of the last one, for rewards r. Of
    equal costs the deeper one is expanded, then the older one. So a constant reward below 1 gives breadth-first search.

    Args:
        width: Steps that are drawn for each expansion.

    Source: Chatziveroglou 2025, A*-Decoding: Token-Efficient Inference Scaling, arXiv 2505.13672. The paper's definition of g could not
        be read; this one is ours.
    """
    number = itertools.count()
    frontier: list[tuple[float, int, int, Any]] = [(0.0, 0, next(number), question.steps.start(question.prompt))]
    while frontier and not frontier[0][3].ended and not question.over:
        cost, depth, _, partial = heapq.heappop(frontier)
        children = question.expand(partial, width)
        for child, reward in zip(children, question.rewards(children), strict=True):
            heapq.heappush(frontier, (cost + 1 - reward, depth - 1, next(number), child))
    whole = [one for one in frontier if one[3].ended]
    best = min(whole or frontier, default=None)
    return None if best is None else best[3]


def best_of_n(question: Question) -> Any:
    """Draw solutions until the budget is spent; return the one whose last step has the highest reward."""
    found: list[tuple[float, Any]] = []
    while not question.over:
        partial = question.steps.start(question.prompt)
        while not partial.ended and not question.over:
            (partial,) = question.expand(partial, 1)
        if partial.ended or not found:
            found.append((question.rewards([partial])[0], partial))
    return _best(found)


def particle_filter(question: Question, *, num_particles: int = 4) -> Any:
    """Draw solutions together, and after each step draw them again by the odds of their rewards; then the next population.

    Source: Puri et al. 2025, A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo
        Methods, arXiv 2502.01618.
    """
    generator = stream(question.seed, "particles", question.prompt.id)
    found: list[tuple[float, Any]] = []
    while not question.over:
        start = question.steps.start(question.prompt)
        rated: list[tuple[float, Any]] = [(0.0, start)] * num_particles
        while not all(one.ended for _, one in rated) and not question.over:
            # Those that have ended keep their reward. The budget may end before every particle has a step.
            moved = [question.expand(one, 1)[0] if not one.ended and not question.over else None for _, one in rated]
            new = [one for one in moved if one is not None]
            scored = list(zip(question.rewards(new), new, strict=True))
            stay = [pair for pair, after in zip(rated, moved, strict=True) if after is None and pair[1] is not start]
            rated = stay + scored
            found += [pair for pair in scored if pair[1].ended]
            if question.over:
                found += [pair for pair in rated if not pair[1].ended]
            odds = _odds([reward for reward, _ in rated])
            chosen = torch.multinomial(odds, num_particles, replacement=True, generator=generator)
            rated = [rated[place] for place in chosen.tolist()]
    return _best(found)


def _odds(rewards: Sequence[float]) -> torch.Tensor:
    bounded = torch.tensor(rewards, dtype=torch.float64).clamp(CERTAIN, 1 - CERTAIN)
    return bounded / (1 - bounded)


def _best(found: Sequence[tuple[float, Any]]) -> Any:
    """Return the solution of the highest reward, the first one of equals."""
    return max(found, key=lambda one: (one[1].ended, one[0]))[1] if found else None
