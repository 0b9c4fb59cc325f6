"""The forms that block efficiency may have as a function of tokens and of parameters, fitted by least squares.

n = points, p = fitted coefficients
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""points_nx: a row for each run, a column for each variable, all above 0."""
Values = NDArray[np.float64]
EXPONENTS = (1e-2, 4.0)
"""Smallest and largest exponent that is tried."""
STARTS = (0.2, 1.0)
"""Exponents from which the search starts; the better end counts."""


class Form(ABC):
    """A function of some variables, with its coefficients after `fit`."""

    name: ClassVar[str]

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        """Of the variables."""

    @property
    @abstractmethod
    def coefficient_names(self) -> tuple[str, ...]:
        """Names of what `fit` returns."""

    @abstractmethod
    def formula(self) -> str:
        """Return the form as text."""

    @abstractmethod
    def fit(self, points_nx: Points, values_n: Values, *, near_p: Values | None = None) -> Values:
        """Return coefficients_p of least squares.

        Args:
            near_p: Coefficients from which a search starts; None: from several places.
        """

    @abstractmethod
    def __call__(self, coefficients_p: Values, points_nx: Points) -> Values:
        """Return values_n of the form at points."""


class Linear(Form):
    """A form that is linear in its coefficients: least squares in one step."""

    @abstractmethod
    def columns(self, points_nx: Points) -> Values:
        """Return columns_np."""

    def fit(self, points_nx: Points, values_n: Values, *, near_p: Values | None = None) -> Values:
        return _least_squares(self.columns(points_nx), values_n)

    def __call__(self, coefficients_p: Values, points_nx: Points) -> Values:
        return np.asarray(self.columns(points_nx) @ coefficients_p)


class Constant(Linear):
    """c."""

    name = "constant"

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        return ("c",)

    def formula(self) -> str:
        return "c"

    def columns(self, points_nx: Points) -> Values:
        return np.ones((len(points_nx), 1))


class Proportional(Linear):
    """c + b x, summed over the variables."""

    name = "linear"

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        return ("c", *(f"slope of {name}" for name in self.names))

    def formula(self) -> str:
        return " + ".join(["c", *(f"b {name}" for name in self.names)])

    def columns(self, points_nx: Points) -> Values:
        return np.column_stack([np.ones(len(points_nx)), points_nx])


class LogLinear(Linear):
    """c + b log10 x, summed over the variables.

    Source: Yan et al. 2025, arXiv 2505.07858.
    """

    name = "log-linear"

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        return ("c", *(f"slope of log10 {name}" for name in self.names))

    def formula(self) -> str:
        return " + ".join(["c", *(f"b log10 {name}" for name in self.names)])

    def columns(self, points_nx: Points) -> Values:
        return np.column_stack([np.ones(len(points_nx)), np.log10(points_nx)])


class Interacting(LogLinear):
    """Log-linear in two variables, with the product of their logarithms."""

    name = "log-linear with interaction"

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        return (*super().coefficient_names, f"slope of log10 {self.names[0]} log10 {self.names[1]}")

    def formula(self) -> str:
        return f"{super().formula()} + b log10 {self.names[0]} log10 {self.names[1]}"

    def columns(self, points_nx: Points) -> Values:
        product_n = np.log10(points_nx).prod(axis=1)
        return np.column_stack([super().columns(points_nx), product_n])


class Power(Form):
    """c - k x^-g, summed over the variables: it approaches c."""

    name = "power"

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        return ("c", *(f"{letter} of {name}" for letter in "kg" for name in self.names))

    def formula(self) -> str:
        return " - ".join(["c", *(f"k {name}^-g" for name in self.names)])

    def fit(self, points_nx: Points, values_n: Values, *, near_p: Values | None = None) -> Values:
        from scipy.optimize import least_squares

        # Given the exponents it is linear in c and k. Variables are divided by their geometric means, so that no power overflows.
        middle_x = np.exp(np.log(points_nx).mean(axis=0))

        def columns(exponents_x: Values) -> Values:
            return np.column_stack([np.ones(len(points_nx)), -((points_nx / middle_x) ** -exponents_x)])

        def residuals(exponents_x: Values) -> Values:
            columns_np = columns(exponents_x)
            return np.asarray(columns_np @ _least_squares(columns_np, values_n) - values_n)

        count = len(middle_x)
        starts = [np.full(count, start) for start in STARTS] if near_p is None else [near_p[1 + count :]]
        tried = [least_squares(residuals, start, bounds=EXPONENTS, xtol=1e-5, ftol=1e-8) for start in starts]
        g_x = min(tried, key=lambda one: one.cost).x
        c, *k = _least_squares(columns(g_x), values_n)
        return np.array([c, *(k * middle_x**g_x), *g_x])

    def __call__(self, coefficients_p: Values, points_nx: Points) -> Values:
        c, k_x, g_x = coefficients_p[0], *np.split(coefficients_p[1:], 2)
        return np.asarray(c - (k_x * points_nx**-g_x).sum(axis=1))


class Saturating(Form):
    """1 + K / (1 + exp(-c - b log10 x ...)): between 1 and K + 1, the bounds of block efficiency with K draft tokens."""

    name = "saturating"

    def __init__(self, names: Sequence[str], *, num_draft_tokens: float) -> None:
        super().__init__(names)
        self.num_draft_tokens = num_draft_tokens

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        return ("c", *(f"slope of log10 {name}" for name in self.names))

    def formula(self) -> str:
        inside = " - ".join(["-c", *(f"b log10 {name}" for name in self.names)])
        return f"1 + {self.num_draft_tokens:g} / (1 + exp({inside}))"

    def fit(self, points_nx: Points, values_n: Values, *, near_p: Values | None = None) -> Values:
        from scipy.optimize import least_squares

        logs_nx = np.log10(points_nx)
        middle_x = logs_nx.mean(axis=0)
        columns_np = np.column_stack([np.ones(len(logs_nx)), logs_nx - middle_x])
        if near_p is None:
            share_n = np.clip((values_n - 1) / self.num_draft_tokens, 0.01, 0.99)
            start = _least_squares(columns_np, np.log(share_n / (1 - share_n)))
        else:
            start = np.array([near_p[0] + near_p[1:] @ middle_x, *near_p[1:]])
        found = least_squares(lambda p: self._of(columns_np @ p) - values_n, start, xtol=1e-5, ftol=1e-8).x
        return np.array([found[0] - found[1:] @ middle_x, *found[1:]])

    def __call__(self, coefficients_p: Values, points_nx: Points) -> Values:
        columns_np = np.column_stack([np.ones(len(points_nx)), np.log10(points_nx)])
        return self._of(columns_np @ coefficients_p)

    def _of(self, inside_n: Values) -> Values:
        from scipy.special import expit

        return np.asarray(1 + self.num_draft_tokens * expit(inside_n))


def forms_of(names: Sequence[str], *, num_draft_tokens: float) -> list[Form]:
    """Return the forms that are fitted to these variables."""
    found: list[Form] = [Constant(names), Proportional(names), LogLinear(names), Power(names)]
    if len(names) == 2:
        found.append(Interacting(names))
    return [*found, Saturating(names, num_draft_tokens=num_draft_tokens)]


def _least_squares(columns_np: Values, values_n: Values) -> Values:
    found, *_ = np.linalg.lstsq(columns_np, values_n, rcond=None)
    return np.asarray(found)


def named(coefficient_names: Sequence[str], coefficients_p: Values) -> Mapping[str, float]:
    """Return coefficients by name."""
    return dict(zip(coefficient_names, map(float, coefficients_p), strict=True))
