"""Forms compared by AICc, with intervals from a bootstrap over runs.

n = points, p = fitted coefficients, b = bootstrap samples
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drafttrain.core.errors import DataError
from drafttrain.eval.scaling.forms import Form, Points, Values, forms_of, named

LEAST_VALUES = 4
"""Different values that a variable must have."""
DRAWS = 1000


@dataclass(frozen=True)
class FittedForm:
    """A form with its coefficients, and how well it describes the runs."""

    name: str
    formula: str
    coefficients: Mapping[str, float]
    low: Mapping[str, float]
    """Ends of the 95 % intervals: quantiles over resampled runs."""
    high: Mapping[str, float]
    aicc: float
    """Akaike's criterion for few points: lower is better, a difference below 2 decides nothing."""
    r2: float
    residual: float
    """Standard deviation of the residuals, in tokens a target call."""
    left_out: float
    """Root of the mean squared error at a run that was left out of the fit."""


@dataclass(frozen=True)
class Scaling:
    """The forms of some variables, the best first."""

    variables: Sequence[str]
    num_draft_tokens: float
    forms: Sequence[FittedForm]

    @property
    def best(self) -> FittedForm:
        """The form of the lowest AICc."""
        return self.forms[0]

    def form(self) -> Form:
        """Return the best form as a function."""
        return next(
            one
            for one in forms_of(self.variables, num_draft_tokens=self.num_draft_tokens)
            if one.name == self.best.name
        )

    def __call__(self, points_nx: Points) -> Values:
        """Return block efficiency by the best form."""
        return self.form()(np.array(list(self.best.coefficients.values())), points_nx)

    def predict(self, at: Mapping[str, float]) -> float:
        """Return block efficiency at one point.

        Raises:
            DataError: The form exceeds the bounds of block efficiency there: it does not hold so far from the runs.
        """
        (value,) = self(np.array([[at[name] for name in self.variables]], dtype=np.float64))
        if not 1 <= value <= self.num_draft_tokens + 1:
            where = ", ".join(f"{name} {at[name]:g}" for name in self.variables)
            raise DataError(
                f"{self.best.name} form predicts a block efficiency of {value:.2f} at {where}; with {self.num_draft_tokens:g} draft "
                f"tokens it is between 1 and {self.num_draft_tokens + 1:g}, so the form does not hold there. Measure nearer runs"
            )
        return float(value)


def fit_scaling(
    variables: Mapping[str, Sequence[float]],
    values: Sequence[float],
    *,
    num_draft_tokens: float,
    seed: int = 0,
    draws: int | None = None,
) -> Scaling:
    """Fit all forms of these variables.

    Args:
        variables: By name, the value of each run.
        values: Block efficiency of each run.
        num_draft_tokens: K: block efficiency is at most K + 1.
        draws: Samples of the bootstrap; None: 1,000.

    Raises:
        DataError: A variable has fewer than four different values, or there are too few runs.
    """
    names = tuple(variables)
    points_nx = np.array([list(column) for column in variables.values()], dtype=np.float64).T
    values_n = np.array(values, dtype=np.float64)
    problems = [
        f"{name} has {count} different value{'s' * (count != 1)}, a form needs {LEAST_VALUES}"
        for name, column in zip(names, points_nx.T, strict=True)
        if (count := len(set(column.tolist()))) < LEAST_VALUES
    ]
    forms = forms_of(names, num_draft_tokens=num_draft_tokens)
    needed = max(len(one.coefficient_names) for one in forms) + 3
    if len(values_n) < needed:
        problems.append(f"{len(values_n)} runs, {needed} are needed to choose between {len(forms)} forms")
    if problems:
        raise DataError(f"cannot fit: {'; '.join(problems)}")
    rows_bn = np.random.default_rng(seed).integers(len(values_n), size=(draws or DRAWS, len(values_n)))
    fitted = [_fitted(form, points_nx, values_n, rows_bn) for form in forms]
    return Scaling(names, num_draft_tokens, sorted(fitted, key=lambda one: one.aicc))


def _fitted(form: Form, points_nx: Points, values_n: Values, rows_bn: np.ndarray) -> FittedForm:
    found_p = form.fit(points_nx, values_n)
    rest_n = values_n - form(found_p, points_nx)
    squares, around = float(rest_n @ rest_n), float(((values_n - values_n.mean()) ** 2).sum())
    names = form.coefficient_names
    drawn_bp = np.array(
        [
            form.fit(points_nx[rows_n], values_n[rows_n], near_p=found_p)
            for rows_n in rows_bn
            if _varies(points_nx[rows_n])
        ]
    )
    low_p, high_p = np.quantile(drawn_bp, [0.025, 0.975], axis=0)
    n, p = len(values_n), len(names)
    return FittedForm(
        name=form.name,
        formula=form.formula(),
        coefficients=named(names, found_p),
        low=named(names, low_p),
        high=named(names, high_p),
        aicc=_aicc(squares, n=n, parameters=p + 1),
        r2=1 - squares / around if around > 0 else math.nan,
        residual=math.sqrt(squares / (n - p)),
        left_out=_left_out(form, points_nx, values_n, found_p),
    )


def _varies(points_nx: Points) -> bool:
    """Return whether every variable has three values or more, so that each form has coefficients."""
    return all(len(np.unique(column)) >= 3 for column in points_nx.T)


def _aicc(squares: float, *, n: int, parameters: int) -> float:
    """Return Akaike's criterion with the correction for few points; `parameters` counts the variance of the residuals."""
    variance = max(squares / n, np.finfo(float).tiny)
    return n * math.log(variance) + 2 * parameters + 2 * parameters * (parameters + 1) / (n - parameters - 1)


def _left_out(form: Form, points_nx: Points, values_n: Values, near_p: Values) -> float:
    """Return the root of the mean squared error at each run, predicted from the others."""
    errors = []
    for i in range(len(values_n)):
        others = np.arange(len(values_n)) != i
        found_p = form.fit(points_nx[others], values_n[others], near_p=near_p)
        errors.append(float(form(found_p, points_nx[i : i + 1])[0] - values_n[i]))
    return math.sqrt(float(np.square(errors).mean()))
