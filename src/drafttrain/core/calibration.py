"""Quality of predicted probabilities: log-likelihood, Brier score, ECE, AUC, reliability. Pure functions on numbers.

N = predictions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Predictions in one range."""

    low: float
    high: float
    count: int
    predicted: float
    """Their mean; nan where the range is empty."""
    observed: float
    """Mean of their labels."""


@dataclass(frozen=True)
class Calibration:
    """All figures of predictions."""

    count: int
    mean_label: float
    mean_predicted: float
    log_likelihood: float
    brier: float
    ece: float
    auc: float
    reliability: Sequence[Bin]
    """The ranges that contain predictions."""


def reliability(predicted_N: ArrayLike, labels_N: ArrayLike, *, num_bins: int = NUM_BINS) -> list[Bin]:
    """Return mean prediction and mean label in ranges of equal width; labels may be soft."""
    predicted, labels = _arrays(predicted_N, labels_N)
    place = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = place == number
        count = int(inside.sum())
        means = (float(predicted[inside].mean()), float(labels[inside].mean())) if count else (float("nan"),) * 2
        bins.append(Bin(number / num_bins, (number + 1) / num_bins, count, *means))
    return bins


def ece(predicted_N: ArrayLike, labels_N: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """Return the expected calibration error: |mean prediction - mean label| by range, weighted by count.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599, 2.
    """
    bins = [one for one in reliability(predicted_N, labels_N, num_bins=num_bins) if one.count]
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.predicted - one.observed) for one in bins) / total if total else float("nan")


def brier(predicted_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the mean squared difference of prediction and label."""
    predicted, labels = _arrays(predicted_N, labels_N)
    return float(((predicted - labels) ** 2).mean())


def log_likelihood(predicted_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the mean log-likelihood of the labels in nats, at most 0."""
    predicted, labels = _arrays(predicted_N, labels_N)
    inside = predicted.clip(1e-7, 1 - 1e-7)
    return float((labels * np.log(inside) + (1 - labels) * np.log(1 - inside)).mean())


def auc(predicted_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Return the probability that an accepted token is predicted above a rejected one; nan where one side is empty.

    A soft label counts as accepted with its value, and as rejected with the rest. Ties count half.
    """
    predicted, labels = _arrays(predicted_N, labels_N)
    order = np.argsort(predicted, kind="stable")
    values, accepted, rejected = predicted[order], labels[order], 1 - labels[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    accepted_at, rejected_at = np.add.reduceat(accepted, starts), np.add.reduceat(rejected, starts)
    below = np.r_[0.0, np.cumsum(rejected_at)[:-1]]
    pairs = accepted.sum() * rejected.sum()
    return float((accepted_at * (below + rejected_at / 2)).sum() / pairs) if pairs else float("nan")


def calibration(predicted_N: ArrayLike, labels_N: ArrayLike) -> Calibration:
    """Return all figures of predictions."""
    predicted, labels = _arrays(predicted_N, labels_N)
    return Calibration(
        count=len(labels),
        mean_label=float(labels.mean()),
        mean_predicted=float(predicted.mean()),
        log_likelihood=log_likelihood(predicted, labels),
        brier=brier(predicted, labels),
        ece=ece(predicted, labels),
        auc=auc(predicted, labels),
        reliability=[one for one in reliability(predicted, labels) if one.count],
    )


def _arrays(predicted_N: ArrayLike, labels_N: ArrayLike) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.asarray(predicted_N, dtype=float), np.asarray(labels_N, dtype=float)
