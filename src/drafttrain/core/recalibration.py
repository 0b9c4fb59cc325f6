"""Maps from a confidence to the chance that it stands for, fitted on (confidence, accepted) pairs. Pure functions on numbers.

N = pairs, M = confidences that are mapped
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

EDGE = 1e-6
"""Confidences are cut to EDGE..1 - EDGE before their logit is taken."""
NEWTON_STEPS = 50


class ChanceMap(Protocol):
    """A map that never falls: a higher confidence never gets a lower chance."""

    method: ClassVar[str]

    def __call__(self, confidence_M: ArrayLike) -> Array:
        """Return chances_M."""
        ...

    def as_json(self) -> dict[str, Any]:
        """Return what `read_map` reads."""
        ...


@dataclass(frozen=True)
class Isotonic:
    """A step function: of all maps that never fall, the one with the least Brier score on the pairs that it was fitted on."""

    starts: Sequence[float]
    """The lowest confidence of each step, ascending. A confidence below the first has the first chance."""
    chances: Sequence[float]
    method: ClassVar[str] = "isotonic"

    @classmethod
    def fit(cls, confidence_N: ArrayLike, accepted_N: ArrayLike) -> Self:
        """Return the map: neighbours whose means fall are pooled. Equal confidences stay together.

        Source: Ayer et al. 1955 (pool adjacent violators); for calibration Zadrozny and Elkan 2002.
        """
        confidence, accepted = _pairs(confidence_N, accepted_N)
        values, place = np.unique(confidence, return_inverse=True)
        counts, sums = np.bincount(place).astype(float), np.bincount(place, weights=accepted)
        starts: list[float] = []
        totals: list[tuple[float, float]] = []
        for value, count, total in zip(values.tolist(), counts.tolist(), sums.tolist(), strict=True):
            start = value
            while totals and totals[-1][1] * count >= total * totals[-1][0]:
                before, start = totals.pop(), starts.pop()
                count, total = count + before[0], total + before[1]
            starts.append(start)
            totals.append((count, total))
        return cls(starts, [total / count for count, total in totals])

    def __call__(self, confidence_M: ArrayLike) -> Array:
        """Return chances_M."""
        step_M = np.searchsorted(self.starts, np.asarray(confidence_M, dtype=float), side="right") - 1
        found: Array = np.asarray(self.chances)[step_M.clip(0)]
        return found

    def as_json(self) -> dict[str, Any]:
        """Return its steps."""
        return {"method": self.method, "starts": list(self.starts), "chances": list(self.chances)}


@dataclass(frozen=True)
class Scaled:
    """sigmoid(scale * logit(confidence) + shift), scale >= 0."""

    scale: float
    shift: float
    method: ClassVar[str] = "platt"

    @classmethod
    def fit(cls, confidence_N: ArrayLike, accepted_N: ArrayLike) -> Self:
        """Return the map of the greatest likelihood; its labels are moved inward, so that a perfect separation has one too.

        Source: Platt 1999, Probabilistic Outputs for Support Vector Machines.
        """
        confidence, accepted = _pairs(confidence_N, accepted_N)
        good = accepted.sum()
        high, low = (good + 1) / (good + 2), 1 / (len(accepted) - good + 2)
        label = low + (high - low) * accepted
        scale, shift = _most_likely(_logit(confidence), label, shifted=True)
        if scale < 0:
            # The likelihood is concave: of the maps that do not fall a constant one has the greatest, that of the labels' mean.
            scale, shift = 0.0, float(_logit(np.array([label.mean()]))[0])
        return cls(scale, shift)

    def __call__(self, confidence_M: ArrayLike) -> Array:
        """Return chances_M."""
        return _sigmoid(self.scale * _logit(np.asarray(confidence_M, dtype=float)) + self.shift)

    def as_json(self) -> dict[str, Any]:
        """Return its two numbers."""
        return {"method": self.method, "scale": self.scale, "shift": self.shift}


@dataclass(frozen=True)
class Temperature(Scaled):
    """sigmoid(logit(confidence) / T): the order of all confidences stays, and 1/2 stays 1/2."""

    method: ClassVar[str] = "temperature"

    @classmethod
    def fit(cls, confidence_N: ArrayLike, accepted_N: ArrayLike) -> Self:
        """Return the map of the greatest likelihood; 1 / T is at most 64.

        Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599, 4.2.
        """
        confidence, accepted = _pairs(confidence_N, accepted_N)
        scale, _ = _most_likely(_logit(confidence), accepted, shifted=False)
        return cls(min(max(scale, 0.0), 64.0), 0.0)


FITS: Mapping[str, Callable[[ArrayLike, ArrayLike], ChanceMap]] = {
    Isotonic.method: Isotonic.fit,
    Temperature.method: Temperature.fit,
    Scaled.method: Scaled.fit,
}
"""By name, the function that fits a map on (confidence_N, accepted_N)."""


def read_map(held: Any) -> ChanceMap:
    """Return the map that `as_json` describes.

    Raises:
        ValueError: It is no such description.
    """
    method = held.get("method") if isinstance(held, dict) else None
    if method == Isotonic.method:
        starts, chances = held.get("starts"), held.get("chances")
        if not (
            _rises(starts) and _rises(chances) and len(starts) == len(chances) and 0 <= chances[0] <= chances[-1] <= 1
        ):
            raise ValueError("starts and chances must be lists of equally many numbers that rise, chances of 0..1")
        return Isotonic(starts, chances)
    if method in (Scaled.method, Temperature.method):
        scale, shift = held.get("scale"), held.get("shift")
        if not (_finite(scale) and _finite(shift) and scale >= 0):
            raise ValueError(
                f"scale must be a number of 0 or more, and shift a number, got {scale!r:.40} and {shift!r:.40}"
            )
        return (Scaled if method == Scaled.method else Temperature)(float(scale), float(shift))
    raise ValueError(f"method must be one of {', '.join(FITS)}, got {method!r:.40}")


def _most_likely(logit_N: Array, label_N: Array, *, shifted: bool) -> tuple[float, float]:
    """Return (scale, shift) of the greatest likelihood of labels of 0..1, by Newton's method with halved steps."""
    x_N2 = np.stack([logit_N, np.ones_like(logit_N) * shifted], axis=1)
    found_2 = np.array([1.0, 0.0])
    best = _cost(found_2, x_N2, label_N)
    for _ in range(NEWTON_STEPS):
        chance_N = _sigmoid(x_N2 @ found_2)
        slope_2 = x_N2.T @ (chance_N - label_N)
        curvature_22 = (x_N2 * (chance_N * (1 - chance_N))[:, None]).T @ x_N2 + 1e-9 * np.eye(2)
        step_2 = np.linalg.solve(curvature_22, slope_2)
        size = 1.0
        while size > 1e-6 and _cost(found_2 - size * step_2, x_N2, label_N) > best:
            size /= 2
        tried_2 = found_2 - size * step_2
        cost = _cost(tried_2, x_N2, label_N)
        if not cost < best - 1e-12 * len(label_N):
            break
        found_2, best = tried_2, cost
    return float(found_2[0]), float(found_2[1])


def _cost(found_2: Array, x_N2: Array, label_N: Array) -> float:
    """Return minus the log-likelihood."""
    score_N = x_N2 @ found_2
    return float((np.logaddexp(0, score_N) - label_N * score_N).sum())


def _pairs(confidence_N: ArrayLike, accepted_N: ArrayLike) -> tuple[Array, Array]:
    confidence, accepted = np.asarray(confidence_N, dtype=float), np.asarray(accepted_N, dtype=float)
    if not len(confidence):
        raise ValueError("there is no pair to fit a map on")
    return confidence, accepted


def _logit(chance: Array) -> Array:
    inside = chance.clip(EDGE, 1 - EDGE)
    found: Array = np.log(inside) - np.log1p(-inside)
    return found


def _sigmoid(score: Array) -> Array:
    found: Array = np.exp(-np.logaddexp(0, -score))
    return found


def _rises(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(map(_finite, given)) and given == sorted(given)


def _finite(given: Any) -> bool:
    # NumPy refuses whole numbers of more than 64 bits.
    return type(given) in (int, float) and abs(given) <= sys.float_info.max
