"""Tests for drift: the block efficiency on recent requests against the requests on which the drafter was promoted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Drift:
    """Recent traffic against the traffic at promotion, by replay of the current drafter."""

    then: float
    """Block efficiency on the requests of the promotion."""
    now: float
    """Block efficiency on recent requests."""
    p_value: float
    """Probability of a drop this large if both come from the same traffic."""

    def json(self) -> dict[str, float]:
        """Return the values for a row of the metrics."""
        return asdict(self)


def drift(then: Sequence[Sequence[float]], now: Sequence[Sequence[float]], *, resamples: int, seed: int) -> Drift:
    """Return the drop of block efficiency and its one-sided p-value, by permutation over requests.

    Args:
        then: (tokens, expected rounds) of each request on which the current drafter was promoted.
        now: (tokens, expected rounds) of each recent request.
    """
    before_R2, after_R2 = np.asarray(then, dtype=float), np.asarray(now, dtype=float)
    pooled_R2, count = np.concatenate([before_R2, after_R2]), len(before_R2)
    observed = _efficiency(before_R2) - _efficiency(after_R2)
    generator = np.random.default_rng(seed)
    as_large = 0
    for _ in range(resamples):
        mixed_R2 = generator.permutation(pooled_R2)
        as_large += _efficiency(mixed_R2[:count]) - _efficiency(mixed_R2[count:]) >= observed - 1e-12
    return Drift(_efficiency(before_R2), _efficiency(after_R2), (as_large + 1) / (resamples + 1))


def _efficiency(counts_R2: Any) -> float:
    tokens, rounds = counts_R2.sum(axis=0)
    return float(tokens / rounds)
