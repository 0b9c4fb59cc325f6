"""Intervals and p-values over prompts: tokens and rounds of the same prompt depend on each other.

One form is for ratios of sums (`_estimate`), the other for shares of prompts. benchmarks/interval_coverage.py measures
their coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drafttrain.eval.interval import Comparison, Interval

CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Standard errors below this share of the value come from floating point."""


Part = tuple[ArrayLike, ArrayLike]
"""Numerators and denominators by prompt."""


def summed_by(units: Sequence[str], *values: ArrayLike) -> list[np.ndarray[Any, Any]]:
    """Return values by prompt, each summed over the prompts of a unit; units are in the order of their first prompts."""
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    place_P = [places[unit] for unit in units]
    return [np.bincount(place_P, np.asarray(value, dtype=float), len(places)) for value in values]


def means(first: Part, second: Part) -> tuple[Part, Part]:
    """Return two parts as means over prompts: every prompt weighs the same, whatever its length (macro averages).

    Prompts that one of the parts has nothing of are left out of both.
    """
    sides = [np.asarray(part, dtype=float) for part in (first, second)]
    counted_P = (sides[0][1] > 0) & (sides[1][1] > 0)
    ones_P = np.ones(int(counted_P.sum()))
    one, other = ((top_P[counted_P] / bottom_P[counted_P], ones_P) for top_P, bottom_P in sides)
    return one, other


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike) -> Interval:
    """Return sum(numerator) / sum(denominator) over prompts."""
    found = _estimate([(numerator, denominator)], lambda ratio: ratio)
    low, high = found.bounds()
    return Interval(found.value, low, high, found.num_prompts)


def ratio_difference(first: Part, second: Part) -> Comparison:
    """Return the difference of two ratios of sums on the same prompts."""
    return _estimate([first, second], lambda a, b: a - b).compared_with(0.0)


def ratio_of_ratios(first: Part, second: Part) -> Comparison:
    """Return the quotient of two ratios of sums on the same prompts: a speed-up."""
    return _estimate([first, second], lambda a, b: a / b).compared_with(1.0)


@dataclass(frozen=True)
class _Estimate:
    value: float
    error: float
    """Standard error over prompts; nan for one prompt."""
    freedom: float
    """Degrees of freedom of that error."""
    num_prompts: int

    def bounds(self) -> tuple[float, float]:
        from scipy import stats

        reach = self.error * stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom) if self.error else 0.0
        return float(self.value - reach), float(self.value + reach)

    def compared_with(self, equal: float) -> Comparison:
        from scipy import stats

        distance = abs(self.value - equal)
        if self.num_prompts < 2:
            p_value = float("nan")
        elif self.error:
            p_value = float(2 * stats.t.sf(distance / self.error, self.freedom))
        else:
            p_value = float(distance <= ROUNDING)
        return Comparison(self.value, *self.bounds(), self.num_prompts, p_value=p_value)


def _estimate(parts: Sequence[Part], of_ratios: Callable[..., Any]) -> _Estimate:
    """Return a function of ratios of sums, with its standard error over prompts by the jackknife.

    Student's t is used instead of the normal distribution. Long texts weigh more than short ones in a ratio of sums: the
    error is known as well as from 1 / sum(share^2) texts of equal length. Its degrees of freedom are that number minus 1.

    Source: Tukey 1958, Bias and confidence in not quite large samples, Annals of Mathematical Statistics 29; Kish 1965,
        Survey Sampling, 11.7, for the number of equal weights.
    """
    sums = [(np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)) for top, bottom in parts]
    # A prompt with nothing to divide by (no round, second or token) does not count for the interval.
    counts_P = np.sum([bottom for _, bottom in sums], axis=0) > 0
    sums = [(top[counts_P], bottom[counts_P]) for top, bottom in sums]
    count = int(counts_P.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of_ratios(*(top.sum() / bottom.sum() for top, bottom in sums)))
        if count < 2:
            return _Estimate(value, float("nan"), float("nan"), count)
        without_P = of_ratios(*((top.sum() - top) / (bottom.sum() - bottom) for top, bottom in sums))
        error = float(np.sqrt((count - 1) / count * ((without_P - without_P.mean()) ** 2).sum()))
    share_P = np.mean([bottom / bottom.sum() for _, bottom in sums], axis=0)
    freedom = float(1 / (share_P**2).sum() - 1)
    return _Estimate(value, 0.0 if error <= ROUNDING * abs(value) else error, freedom, count)


def share_interval(part: ArrayLike, whole: ArrayLike) -> Interval:
    """Return the share sum(part) / sum(whole) over prompts.

    Where all prompts succeed, their spread is 0 although the share is not known exactly. Wilson's interval uses the largest
    spread that a share can have: it is right where prompts succeed or fail, and wide where they succeed in part.

    Source: Wilson 1927, Probable Inference, JASA 22(158), for the score interval.
    """
    parts_P, wholes_P = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    value, count = float(parts_P.sum() / wholes_P.sum()), len(parts_P)
    if count < 2:
        return Interval(value, float("nan"), float("nan"), count)
    equal = float(wholes_P.sum() ** 2 / (wholes_P**2).sum())
    z2 = _normal_quantile() ** 2
    centre = (value + z2 / (2 * equal)) / (1 + z2 / equal)
    reach = float(np.sqrt(value * (1 - value) * z2 / equal + (z2 / (2 * equal)) ** 2)) / (1 + z2 / equal)
    return Interval(value, min(value, centre - reach), max(value, centre + reach), count)


def share_difference(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Return the difference of two shares of the same prompts, each of which succeeds (1) or fails (0).

    Two prompts are added: one that only the first solves, and one that only the second solves. So the interval has a width
    even where both solve the same prompts.

    Source: Bonett & Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, Journal of Educational and Behavioral Statistics 37(4).
    """
    from scipy import stats

    differences_P = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    value, count = float(differences_P.mean()), len(differences_P)
    if count < 2:
        return Comparison(value, float("nan"), float("nan"), count, p_value=float("nan"))
    added_P = np.append(differences_P, [1.0, -1.0])
    centre, error = float(added_P.mean()), float(added_P.std() / np.sqrt(len(added_P)))
    reach = error * _normal_quantile()
    p_value = float(2 * stats.norm.sf(abs(centre) / error))
    return Comparison(value, max(-1.0, centre - reach), min(1.0, centre + reach), count, p_value=p_value)


def _normal_quantile() -> float:
    from scipy import stats

    return float(stats.norm.ppf((1 + CONFIDENCE) / 2))
