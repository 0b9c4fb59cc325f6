"""drafttrain fit-scaling: how block efficiency grows with tokens and parameters, over finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.console import say, table
from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json
from drafttrain.core.provenance import provenance
from drafttrain.eval.page import write_picture
from drafttrain.eval.scaling.budget import Plan, best_for
from drafttrain.eval.scaling.fit import LEAST_VALUES, Scaling, fit_scaling
from drafttrain.eval.typed_json import to_json
from drafttrain.pipeline.scaling_runs import ScalingPoint, read_points

VARIABLES = ("tokens", "parameters")


@dataclass(frozen=True)
class ScalingResult:
    """The content of scaling.json."""

    points: Sequence[ScalingPoint]
    scaling: Scaling
    predicted: float | None
    plan: Plan | None
    provenance: Mapping[str, Any]


def fit_runs(
    paths: Sequence[Path],
    *,
    out: Path,
    at: Mapping[str, float] | None = None,
    budget: float | None = None,
) -> ScalingResult:
    """Fit every form to the runs, print the table, and write scaling.json and scaling.png.

    Args:
        at: Predict block efficiency there: values of `tokens` and `parameters`.
        budget: FLOPs of a training to plan.

    Raises:
        DataError: The runs cannot be read, vary too little, or a question lies outside of what they show.
    """
    points = read_points(paths)
    scaling = _scaling(points)
    _show(scaling)
    predicted = None if at is None else _predicted(scaling, at)
    if at is not None:
        say(f"predicted block efficiency at {', '.join(f'{key} {at[key]:g}' for key in at)}: {predicted:.3f}")
    plan = None if budget is None else _plan(scaling, points, budget)
    if plan is not None:
        say(
            f"a training of {budget:.3g} FLOPs: {plan.parameters:,.0f} parameters on {plan.tokens:,.0f} tokens, predicted block "
            f"efficiency {plan.block_efficiency:.2f}, memory-bound speed-up {plan.mbsu:.2f}"
        )
    result = ScalingResult(points, scaling, predicted, plan, provenance())
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "scaling.json", to_json(result))
    write_picture(out / "scaling.png", lambda axes: _draw(axes, points, scaling), columns=2, height=3.6)
    say(f"figures: {out / 'scaling.json'}, {out / 'scaling.png'}")
    return result


def _scaling(points: Sequence[ScalingPoint]) -> Scaling:
    """Return the forms of what varies between the runs."""
    columns = {name: [float(getattr(point, name)) for point in points] for name in VARIABLES}
    varying = {name: column for name, column in columns.items() if len(set(column)) > 1}
    if not varying:
        raise DataError(f"all {len(points)} runs have the same tokens and parameters: there is nothing to fit")
    values = [point.block_efficiency for point in points]
    return fit_scaling(varying, values, num_draft_tokens=points[0].num_draft_tokens)


def _show(scaling: Scaling) -> None:
    rows = [
        [
            form.name,
            form.formula,
            "; ".join(
                f"{name} {value:.4g} [{form.low[name]:.4g}, {form.high[name]:.4g}]"
                for name, value in form.coefficients.items()
            ),
            f"{form.aicc - scaling.best.aicc:.1f}",
            f"{form.r2:.3f}",
            f"{form.residual:.3f}",
            f"{form.left_out:.3f}",
        ]
        for form in scaling.forms
    ]
    columns = ["form", "block efficiency", "coefficients, 95 % over runs", "AICc above the best"]
    columns += ["R2", "residual", "error left out"]
    table(rows, columns=columns, title=f"\nBlock efficiency by {' and '.join(scaling.variables)}")
    close = [form.name for form in scaling.forms[1:] if form.aicc - scaling.best.aicc < 2]
    if close:
        say(f"{', '.join(close)}: as good as {scaling.best.name} on these runs (AICc differs by less than 2)")


def _predicted(scaling: Scaling, at: Mapping[str, float]) -> float:
    if set(scaling.variables) == set(at):
        return scaling.predict(at)
    raise DataError(f"--at names {' and '.join(at)}; the runs vary in {' and '.join(scaling.variables)}")


def _plan(scaling: Scaling, points: Sequence[ScalingPoint], budget: float) -> Plan:
    if set(scaling.variables) != set(VARIABLES):
        raise DataError(f"--budget needs runs of {LEAST_VALUES} sizes and {LEAST_VALUES} numbers of tokens at least")
    measured = [(one.parameters, one.block_efficiency / one.mbsu - 1) for one in points if not math.isnan(one.mbsu)]
    if len({size for size, _ in measured}) < 2:
        raise DataError("--budget needs the memory-bound speed-up (mbsu) of runs of two sizes at least")
    return best_for(
        scaling,
        budget,
        costs=measured,
        parameters=_range([point.parameters for point in points]),
        tokens=_range([point.tokens for point in points]),
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _draw(axes: Sequence[Any], points: Sequence[ScalingPoint], scaling: Scaling) -> None:
    """Draw the runs and the best form against tokens and against parameters, a curve for each value of the other."""
    for ax, name, other in zip(axes, VARIABLES, reversed(VARIABLES), strict=True):
        groups = sorted({getattr(point, other) for point in points})
        for group in groups:
            own = [point for point in points if getattr(point, other) == group]
            drawn = ax.plot(
                [getattr(p, name) for p in own],
                [p.block_efficiency for p in own],
                "o",
                ms=4,
                label=f"{group:,.0f} {other}",
            )
            if name in scaling.variables and len({getattr(p, name) for p in own}) > 1:
                xs = np.geomspace(min(getattr(p, name) for p in own), max(getattr(p, name) for p in own), 50)
                at = {name: xs, other: np.full(50, float(group))}
                ax.plot(
                    xs, scaling(np.column_stack([at[key] for key in scaling.variables])), color=drawn[0].get_color()
                )
        ax.set(xscale="log", xlabel=name, ylabel="block efficiency")
        if len(groups) <= 12:
            ax.legend(fontsize=6, frameon=False)
    axes[0].set_title(f"curves: {scaling.best.name} form", fontsize=8)
