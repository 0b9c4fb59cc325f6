"""Has the traffic moved away from the drafter? Block efficiency of recent requests against those it was promoted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Drift:
    """Recent traffic against that of the promotion, by replay of the current drafter."""

    then: float
    """Block efficiency when it was promoted."""
    now: float
    p_value: float
    """Chance of so large a fall when both are drawn from the same traffic."""

    def json(self) -> dict[str, float]:
        """Return what a row of the metrics holds."""
        return asdict(self)


def drift(then: Sequence[Sequence[float]], now: Sequence[Sequence[float]], *, resamples: int, seed: int) -> Drift:
    """Return the fall of block efficiency and its one-sided p-value by permutation over requests.

    Args:
        then: (tokens, expected rounds) of each request that the current drafter was promoted on.
        now: The same of the recent ones.
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
