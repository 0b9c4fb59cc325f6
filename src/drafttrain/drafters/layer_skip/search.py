"""The search for the sublayers to skip: random sets, and every so often the most promising set under a Gaussian process.

S = sublayers that can be skipped, K = sublayers that are skipped, N = sets that were scored, M = sets that are compared
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from drafttrain.core.settings import setting
from drafttrain.target_model.sublayers import Skipped

Array = NDArray[np.float64]

POOL = 256
"""Random sets among which a Bayesian step chooses, beside those that differ from the best one in one sublayer."""
OPTIMISM = 2.5
"""Standard deviations that a Bayesian step adds to the expected score."""
LENGTH_SCALES = (0.5, 1.0, 2.0, 4.0)
"""Of the kernel, in the distance sqrt(sublayers that differ); the likeliest one given the scores is used."""
NOISE = 1e-4
"""Variance of a score, in units of the variance of all scores."""


@dataclass
class SearchSettings:
    """How many sublayers are skipped, and how the set is searched."""

    ratio: float = setting(
        0.45, help="Share of the sublayers between the first and the last block that is skipped.", gt=0, lt=1
    )
    window: int = setting(32, help="Tokens of a text on which a set is scored.", ge=2)
    bayes_every: int = setting(
        25,
        help="Of this many steps one is Bayesian, the others try a random set; 1: all, as in Self-Speculative decoding.",
        ge=1,
    )
    enough: float = setting(
        0.95, help="End the search at this score (1: each token is the draft's likeliest one).", gt=0, le=1
    )
    patience: int = setting(300, help="End the search after this many steps without a better set.", ge=1)


class Search:
    """Finds the K of S sublayers whose absence changes least. Sets are tuples of numbers below S, ascending.

    It depends on the seed and the scores alone, so that an interrupted search continues from stored scores.

    Sources: Xia et al. 2024, SWIFT, arXiv 2410.06916; the Bayesian step alone: Zhang et al. 2023, Draft & Verify, arXiv 2309.08168.

    Args:
        first: The set that is scored first.
    """

    def __init__(self, size: int, first: Sequence[int], settings: SearchSettings, *, seed: int) -> None:
        self._size = size
        self._first = tuple(sorted(first))
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._scores: dict[tuple[int, ...], float] = {}
        self._num_since_best = 0
        self.best = self._first
        """The set with the highest score so far, the earliest of equal ones."""

    @property
    def num_steps(self) -> int:
        """Sets that were scored."""
        return len(self._scores)

    @property
    def best_score(self) -> float:
        """The highest score so far; 0 before the first one."""
        return self._scores.get(self.best, 0.0)

    @property
    def ended(self) -> bool:
        """Whether it found enough, did not find more for long, or scored every set."""
        return (
            self.best_score >= self._settings.enough
            or self._num_since_best >= self._settings.patience
            or self.num_steps == comb(self._size, len(self._first))
        )

    def propose(self) -> tuple[int, ...]:
        """Return the set to score next, one without a score."""
        assert not self.ended
        if not self._scores:
            return self._first
        if (self.num_steps + 1) % self._settings.bayes_every:
            return self._unknown()
        pool = list(dict.fromkeys([*self._near_best(), *(self._unknown() for _ in range(POOL))]))
        bounds_M = upper_bounds(self._rows(self._scores), np.array(list(self._scores.values())), self._rows(pool))
        return pool[int(bounds_M.argmax())]

    def observe(self, chosen: Sequence[int], score: float) -> None:
        """Store the score of a set."""
        chosen = tuple(chosen)
        is_better = not self._scores or score > self.best_score
        self._scores[chosen] = score
        self._num_since_best = 0 if is_better else self._num_since_best + 1
        if is_better:
            self.best = chosen

    def _unknown(self) -> tuple[int, ...]:
        """Return a random set without a score."""
        while True:
            drawn = self._random.choice(self._size, len(self._first), replace=False)
            chosen = tuple(sorted(map(int, drawn)))
            if chosen not in self._scores:
                return chosen

    def _near_best(self) -> Iterator[tuple[int, ...]]:
        """Yield the sets without a score that differ from the best one in one sublayer."""
        for removed in self.best:
            for added in range(self._size):
                changed = tuple(sorted({*self.best, added} - {removed}))
                if added not in self.best and changed not in self._scores:
                    yield changed

    def _rows(self, sets: Any) -> Array:
        """Return which_NS: 1 where a set has the sublayer."""
        rows = np.zeros((len(sets), self._size))
        for row, chosen in zip(rows, sets, strict=True):
            row[list(chosen)] = 1
        return rows


def upper_bounds(seen_NS: Array, scores_N: Array, asked_MS: Array) -> Array:
    """Return mean + OPTIMISM * deviation of the scores of sets, by a Gaussian process through the known scores.

    The kernel is Matern 5/2 of the sets as points of {0, 1}^S. Scores are normalized. The length scale is the one of
    LENGTH_SCALES with the highest marginal likelihood.
    """
    spread = float(scores_N.std()) or 1.0
    values_N = (scores_N - scores_N.mean()) / spread
    fits = []
    for scale in LENGTH_SCALES:
        factor_NN = np.linalg.cholesky(_matern(seen_NS, seen_NS, scale) + NOISE * np.eye(len(seen_NS)))
        whitened_N = solve_triangular(factor_NN, values_N, lower=True)
        likelihood = -0.5 * whitened_N @ whitened_N - np.log(np.diag(factor_NN)).sum()
        fits.append((likelihood, scale, factor_NN, whitened_N))
    _, scale, factor_NN, whitened_N = max(fits, key=lambda fit: fit[0])
    across_NM = solve_triangular(factor_NN, _matern(seen_NS, asked_MS, scale), lower=True)
    deviation_M = np.sqrt(np.clip(1 - (across_NM**2).sum(axis=0), 0, None))
    bounds_M: Array = scores_N.mean() + spread * (whitened_N @ across_NM + OPTIMISM * deviation_M)
    return bounds_M


def _matern(one_NS: Array, other_MS: Array, scale: float) -> Array:
    apart_NM = one_NS.sum(axis=1)[:, None] + other_MS.sum(axis=1) - 2 * one_NS @ other_MS.T
    ratio_NM = np.sqrt(5 * apart_NM) / scale
    kernel_NM: Array = (1 + ratio_NM + ratio_NM**2 / 3) * np.exp(-ratio_NM)
    return kernel_NM


def num_skipped(num_blocks: int, ratio: float) -> int:
    """Return how many sublayers a ratio skips: at least one, and not all."""
    size = 2 * (num_blocks - 2)
    return min(max(1, int(size * ratio)), size - 1)


def spread(num_blocks: int, ratio: float) -> tuple[int, ...]:
    """Return as many sublayers as the ratio skips, at equal distances."""
    size, count = 2 * (num_blocks - 2), num_skipped(num_blocks, ratio)
    return tuple(size * (2 * place + 1) // (2 * count) for place in range(count))


def as_skipped(chosen: Sequence[int]) -> Skipped:
    """Return a set of the search by blocks: number 2 i is the attention of block i + 1, 2 i + 1 its MLP."""
    attention, mlp = ([1 + number // 2 for number in sorted(chosen) if number % 2 == odd] for odd in (0, 1))
    return Skipped(tuple(attention), tuple(mlp))


def as_chosen(skipped: Skipped) -> tuple[int, ...]:
    """Return skipped sublayers as a set of the search: the inverse of `as_skipped`."""
    return tuple(sorted([*(2 * (i - 1) for i in skipped.attention), *(2 * (i - 1) + 1 for i in skipped.mlp)]))
