"""The permutation test of two ways of decoding the same prompts, and Holm's correction for several tests.

B = assignments, P = prompts
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from drafttrain.eval.statistics import Part

RANDOM_ASSIGNMENTS = 9_999
MOST_PROMPTS_COUNTED = 13
"""Up to this many prompts all 2^P assignments are counted instead of random ones."""
TIE = 1e-9
"""Differences that are equal up to this share of the observed one are ties: they differ by rounding."""


def permutation_p_value(first: Part, second: Part, *, seed: int = 0) -> float:
    """Return the share of assignments whose difference of ratios of sums is at least as large as the observed one.

    If two drafters are equally good, it is chance which outcome of a prompt belongs to which of them. An assignment swaps
    both outcomes of some prompts; for a mean of differences, it flips their signs. The test assumes no distribution and is
    exact for any number of prompts. It is two-sided; nan for one prompt.

    Source: Fisher 1935, The Design of Experiments, section 21; Phipson & Smyth 2010, Permutation p-values should never be
        zero, for the observed assignment in the random count.
    """
    sides = [np.asarray(part, dtype=float) for part in (first, second)]
    counted_P = (sides[0][1] > 0) & (sides[1][1] > 0)
    one, other = (side[:, counted_P] for side in sides)
    count = int(counted_P.sum())
    if count < 2:
        return math.nan
    every = count <= MOST_PROMPTS_COUNTED
    if every:
        swapped_BP = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    else:
        swapped_BP = np.random.default_rng(seed).integers(0, 2, (RANDOM_ASSIGNMENTS, count), dtype=np.int8)
    moved = swapped_BP @ (other - one).T
    ones, others = one.sum(axis=1) + moved, other.sum(axis=1) - moved
    difference_B = ones[:, 0] / ones[:, 1] - others[:, 0] / others[:, 1]
    observed = abs(float(one[0].sum() / one[1].sum() - other[0].sum() / other[1].sum()))
    as_large = int((np.abs(difference_B) >= observed * (1 - TIE)).sum())
    return as_large / len(difference_B) if every else (1 + as_large) / (1 + len(difference_B))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, corrected so that all of them together err in 5 % at most; nan stays nan.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6(2).
    """
    corrected = [math.nan] * len(p_values)
    known = sorted((value, place) for place, value in enumerate(p_values) if not math.isnan(value))
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[place] = largest
    return corrected
