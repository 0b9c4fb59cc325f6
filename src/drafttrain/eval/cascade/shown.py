"""A frontier as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.core.console import say, table
from drafttrain.eval.cascade.frontier import Frontier, Point
from drafttrain.eval.interval import Interval
from drafttrain.eval.page import label

COLUMNS = ("who writes", "by large", "solved", "minus large", "minus random", "same text as large", "cost", "calls")


def show(frontier: Frontier) -> None:
    """Print the table, LOSSY."""
    table(rows(frontier), columns=COLUMNS, title=f"\n{heading(frontier)}")
    say(
        f"cost: {_axis(frontier)}, prompts included; calls: of the large and of the small model for an output; "
        "brackets: 95 % intervals over prompts, differences paired"
    )


def heading(frontier: Frontier) -> str:
    """Return what the figures are about."""
    drafts = "" if frontier.draft is None else f", the small model drafts for the large one ({frontier.draft['kind']})"
    return (
        f"LOSSY: {frontier.kind} between {frontier.target} and {frontier.small}, {frontier.num_prompts} prompts, "
        f"temperature {frontier.temperature:g}{drafts}"
    )


def rows(frontier: Frontier) -> list[list[str]]:
    """Return the rows: both models alone, then each value with random routing at its rate."""
    found = [_row(frontier.large, frontier, None), _row(frontier.small_alone, frontier, None)]
    for step in frontier.steps:
        found += [_row(step.cascade, frontier, step.solved_less_random), _row(step.random, frontier, None)]
    return found


def _row(point: Point, frontier: Frontier, less_random: Interval | None) -> list[str]:
    same = "-" if point.agreement is None else f"{point.agreement.equal_outputs.value:.1%}"
    solved, less_large = ("-" if one is None else one.text() for one in (point.solved, point.solved_less_large))
    return [
        point.name,
        f"{point.by_large.value:.1%}",
        solved,
        "" if point is frontier.large else less_large,
        "" if less_random is None else less_random.text(),
        same,
        point.cost[frontier.axis].text(),
        f"{point.large_calls:.1f} + {point.small_calls:.1f}",
    ]


def quality(point: Point) -> Interval:
    """Return what the picture shows against cost: prompts solved, else tokens before the first difference from the large model."""
    if point.solved is not None:
        return point.solved
    assert point.agreement is not None, "without a checker texts are greedy"
    return point.agreement.tokens_before_difference


def draw(axes: Sequence[Any], frontier: Frontier) -> None:
    """Draw quality against cost: the cascade, random routing at its rates, and both models alone."""
    (ax,) = axes
    series = {
        frontier.kind: ([step.cascade for step in frontier.steps], "o-"),
        "random routing, same rate": ([step.random for step in frontier.steps], "s:"),
        "large alone": ([frontier.large], "D"),
        "small alone": ([frontier.small_alone], "^"),
    }
    for name, (points, style) in series.items():
        points = sorted(points, key=lambda one: one.cost[frontier.axis].value)
        costs, values = [one.cost[frontier.axis].value for one in points], [quality(one) for one in points]
        reach = [[one.value - one.low for one in values], [one.high - one.value for one in values]]
        ax.errorbar(costs, [one.value for one in values], yerr=reach, fmt=style, ms=4, lw=1.2, label=label(name))
    for number, step in enumerate(frontier.steps):
        at = (step.cascade.cost[frontier.axis].value, quality(step.cascade).value)
        # Neighbours may lie at one place.
        ax.annotate(f"{step.value:g}", at, textcoords="offset points", xytext=(4, (4, -10, 12)[number % 3]), fontsize=6)
    solved = frontier.large.solved is not None
    ax.set(
        xlabel=f"cost: {_axis(frontier)}",
        ylabel="share of prompts solved" if solved else "share of tokens before the first difference",
        title=f"LOSSY: {label(frontier.kind)} by {label(frontier.swept)}",
    )
    ax.legend(fontsize=7, frameon=False)


def _axis(frontier: Frontier) -> str:
    what = {"bytes": "bytes read", "flops": "operations", "seconds": "seconds here"}
    return f"{what.get(frontier.axis, f'predicted seconds on {frontier.axis}')} of both models / large alone"
