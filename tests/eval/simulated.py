"""Random evaluations whose true figures are known, for tests of intervals and p-values.

E = evaluations, P = prompts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafttrain.eval.interval import Interval
from drafttrain.eval.statistics import (
    ratio_difference,
    ratio_interval,
    ratio_of_ratios,
    share_difference,
    share_interval,
)

NUM_DRAFT_TOKENS = 5
Array = np.ndarray[Any, Any]
Part = tuple[Array, Array]
"""Numerators and denominators by prompt."""


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation: how prompts are drawn, how it is estimated, and its true value."""

    draw: Callable[[Any, int], list[Part]]
    """Draws so many prompts; returns the parts of the figure."""
    estimate: Callable[..., Interval]
    of_sums: Callable[..., float]
    """Computes the figure from ratios of sums."""

    def evaluations(self, generator: Any, *, count: int, num_prompts: int) -> list[Interval]:
        """Return the estimates of independent evaluations."""
        parts = [
            (top.reshape(count, num_prompts), bottom.reshape(count, num_prompts))
            for top, bottom in self.draw(generator, count * num_prompts)
        ]
        return [self.estimate(*((top_EP[e], bottom_EP[e]) for top_EP, bottom_EP in parts)) for e in range(count)]

    def truth(self, generator: Any, *, num_prompts: int) -> float:
        """Return the figure over very many prompts."""
        return float(self.of_sums(*(top.sum() / bottom.sum() for top, bottom in self.draw(generator, num_prompts))))


def rounds(generator: Any, acceptance_P: Array, tokens_P: Array) -> Array:
    """Return the rounds of texts: each accepts draft tokens up to the first rejected one, at most 5, and adds one."""
    most = int(tokens_P.max())
    rejected = generator.geometric(1 - acceptance_P[:, None], size=(len(acceptance_P), most))
    written = np.minimum(rejected, NUM_DRAFT_TOKENS + 1).cumsum(axis=1)
    return 1.0 + (written < tokens_P[:, None]).sum(axis=1)


def texts(generator: Any, count: int, *, shortest: int = 4) -> tuple[Array, Array]:
    """Return acceptance rates and lengths of texts: some are cut at 64 tokens, others end earlier."""
    lengths_P = generator.integers(shortest, 96, count).clip(max=64).astype(float)
    return generator.beta(6, 4, count), lengths_P


def another(generator: Any, acceptance_P: Array, *, gain: float = 0.0) -> Array:
    """Return the acceptance rates of another drafter on the same prompts."""
    logit_P = np.log(acceptance_P / (1 - acceptance_P)) + generator.normal(gain, 0.3, len(acceptance_P))
    return 1 / (1 + np.exp(-logit_P))


def block_efficiency(generator: Any, count: int) -> list[Part]:
    acceptance_P, tokens_P = texts(generator, count)
    return [(tokens_P, rounds(generator, acceptance_P, tokens_P))]


def alpha(generator: Any, count: int) -> list[Part]:
    acceptance_P, tokens_P = texts(generator, count)
    return [(generator.binomial(tokens_P.astype(int), acceptance_P).astype(float), tokens_P)]


def speed(generator: Any, count: int) -> list[Part]:
    acceptance_P, tokens_P = texts(generator, count)
    return [(tokens_P, rounds(generator, acceptance_P, tokens_P) * generator.lognormal(0, 0.2, count))]


def speed_up(generator: Any, count: int) -> list[Part]:
    acceptance_P, tokens_P = texts(generator, count)
    stall_P = generator.lognormal(0, 0.2, count)
    seconds_P = rounds(generator, acceptance_P, tokens_P) * stall_P * generator.lognormal(0, 0.1, count)
    return [(tokens_P, seconds_P), (tokens_P, tokens_P * stall_P)]


def two_drafters(gain: float) -> Callable[[Any, int], list[Part]]:
    def draw(generator: Any, count: int) -> list[Part]:
        acceptance_P, tokens_P = texts(generator, count)
        both = [another(generator, acceptance_P), another(generator, acceptance_P, gain=gain)]
        return [(tokens_P, rounds(generator, one_P, tokens_P)) for one_P in both]

    return draw


def equal_speeds(generator: Any, count: int) -> list[Part]:
    acceptance_P, tokens_P = texts(generator, count)
    seconds_P = rounds(generator, acceptance_P, tokens_P)
    return [(tokens_P, seconds_P * generator.lognormal(0, 0.1, count)) for _ in range(2)]


def solved(generator: Any, count: int) -> list[Part]:
    return [((generator.random(count) < 0.7).astype(float), np.ones(count))]


def both_solved(generator: Any, count: int) -> list[Part]:
    hard_P = generator.random(count)
    return [((hard_P + generator.normal(0, 0.2, count) < 0.6).astype(float), np.ones(count)) for _ in range(2)]


FIGURES = {
    "block efficiency": Figure(block_efficiency, lambda one: ratio_interval(*one), lambda a: a),
    "alpha": Figure(alpha, lambda one: ratio_interval(*one), lambda a: a),
    "tokens a second": Figure(speed, lambda one: ratio_interval(*one), lambda a: a),
    "speed-up": Figure(speed_up, ratio_of_ratios, lambda a, b: a / b),
    "difference of two drafters, paired": Figure(two_drafters(0.4), ratio_difference, lambda a, b: a - b),
}
"""Their intervals should contain the truth in 95 % of the evaluations."""

EQUALS = {
    "difference in block efficiency": Figure(two_drafters(0.0), ratio_difference, lambda a, b: a - b),
    "quotient of speeds": Figure(equal_speeds, ratio_of_ratios, lambda a, b: a / b),
}
"""Two equal drafters: 5 % of the evaluations should find a difference."""

SHARES = {
    "share of prompts solved": Figure(solved, lambda one: share_interval(*one), lambda a: a),
    "difference of shares, paired": Figure(
        both_solved, lambda one, other: share_difference(one[0], other[0]), lambda a, b: a - b
    ),
}
"""Prompts succeed or fail: few values are possible, and the interval covers 95 % or more."""
