"""A frontier of a stop-and-exit controller as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.core.console import say, table
from drafttrain.eval.interval import Interval
from drafttrain.eval.page import label
from drafttrain.eval.stop_exit.frontier import Point, StopExitFrontier

COLUMNS = (
    *("way", "finished", "accepted", "minus whole", "minus random", "same as whole"),
    *("layer passes", "token rows", "bytes", "passes / token"),
)
OF_LAYERS = ("after layer", "GO_ON", "EXIT", "STOP", "stop AUC", "stop ECE", "exit AUC", "exit ECE")


def show(frontier: StopExitFrontier) -> None:
    """Print the tables, LOSSY."""
    rows = [_row(one, None) for one in (frontier.whole, *frontier.fixed)]
    for step in frontier.steps:
        rows += [_row(step.controller, step.accepted_less_random), _row(step.random, None)]
    table(rows, columns=COLUMNS, title=f"\n{heading(frontier)}")
    say(
        "accepted: of all lines, the completion is the true rest of the line; layer passes (calls of a block), token rows (tokens "
        "through blocks) and bytes: over the whole target, without the prompt; brackets: 95 % intervals over lines, differences paired"
    )
    table(
        [
            (
                str(one.layer),
                *(f"{one.shares[name]:.1%}" for name in ("GO_ON", "EXIT", "STOP")),
                *(f"{value:.3f}" for value in (one.stop.auc, one.stop.ece)),
                *(("-", "-") if one.exit is None else (f"{value:.3f}" for value in (one.exit.auc, one.exit.ece))),
            )
            for one in frontier.classifiers
        ],
        columns=OF_LAYERS,
        title="\nLabels and classifiers on positions of the measured texts",
    )


def heading(frontier: StopExitFrontier) -> str:
    """Return what the figures are about."""
    layers = ", ".join(map(str, frontier.layers))
    return (
        f"LOSSY: stop-and-exit controller on {frontier.target}, after {layers} of {frontier.num_layers} layers, "
        f"{frontier.num_cases} lines"
    )


def _row(point: Point, less_random: Interval | None) -> list[str]:
    return [
        point.name,
        f"{point.finished.value:.1%}",
        point.accepted.text(3),
        point.accepted_less_whole.text(3),
        "" if less_random is None else less_random.text(3),
        f"{point.same_as_whole.value:.1%}",
        point.layer_passes.text(),
        f"{point.layer_rows.value:.2f}",
        f"{point.bytes_read.value:.2f}",
        f"{point.passes_per_token.value:.2f}" if point.finished.value else "-",
    ]


def draw(axes: Sequence[Any], frontier: StopExitFrontier) -> None:
    """Draw accepted completions against layers run: a line for each stop threshold, and the baselines."""
    (ax,) = axes
    stops = sorted({step.controller.stop or 0.0 for step in frontier.steps}, reverse=True)
    series = [
        (
            f"stop {'never' if stop > 1 else f'{stop:g}'}",
            [one.controller for one in frontier.steps if one.controller.stop == stop],
            "o-",
        )
        for stop in stops
    ]
    series += [
        ("random, same rates", [step.random for step in frontier.steps], "s"),
        ("fixed exit", list(frontier.fixed), "^:"),
        ("whole target", [frontier.whole], "D"),
    ]
    for name, points, style in series:
        points = sorted(points, key=lambda one: one.layer_passes.value)
        values = [one.accepted for one in points]
        reach = [[one.value - one.low for one in values], [one.high - one.value for one in values]]
        ax.errorbar(
            [one.layer_passes.value for one in points],
            [one.value for one in values],
            yerr=reach,
            fmt=style,
            ms=4,
            lw=1.1,
            elinewidth=0.5,
            label=label(name),
        )
    ax.set(
        xlabel="layer passes / whole target",
        ylabel="share of lines accepted",
        title="LOSSY: stop-and-exit controller by thresholds",
    )
    ax.legend(fontsize=6, frameon=False)
