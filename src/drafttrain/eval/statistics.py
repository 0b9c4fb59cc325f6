"""Intervals and tests whose unit is the prompt: tokens and rounds inside a prompt depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def json(self) -> dict[str, float]:
        """Return what eval.json holds."""
        return asdict(self)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, *, resamples: int, seed: int) -> Interval:
    """Return sum(numerator) / sum(denominator) over prompts, prompts resampled."""
    return _bootstrap((numerator, denominator), lambda n, d: n / d, resamples=resamples, seed=seed)


def ratio_difference(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike], *, resamples: int, seed: int
) -> Interval:
    """Return the difference of two ratios of sums on the same prompts; each resample takes the same prompts of both."""
    return _bootstrap((*first, *second), lambda a, b, c, d: a / b - c / d, resamples=resamples, seed=seed)


def ratio_of_ratios(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike], *, resamples: int, seed: int
) -> Interval:
    """Return the quotient of two ratios of sums on the same prompts: a speed-up."""
    return _bootstrap((*first, *second), lambda a, b, c, d: (a / b) / (c / d), resamples=resamples, seed=seed)


def _bootstrap(samples: Sequence[ArrayLike], of_sums: Any, *, resamples: int, seed: int) -> Interval:
    from scipy import stats

    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    value = float(of_sums(*(array.sum() for array in arrays)))
    if len(arrays[0]) < 2:
        return Interval(value, float("nan"), float("nan"))

    def statistic(*parts: Any, axis: int = -1) -> Any:
        return of_sums(*(part.sum(axis=axis) for part in parts))

    found = stats.bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def sign_flip_p_value(differences: ArrayLike, *, resamples: int, seed: int) -> float:
    """Return the two-sided p-value of a paired permutation test on per-prompt differences."""
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0
    result = stats.permutation_test(
        (values,),
        lambda x, axis=-1: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
