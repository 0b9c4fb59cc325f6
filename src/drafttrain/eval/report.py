"""report.html: one file with tables, pictures and samples of an evaluation."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from drafttrain.core.files import write_text
from drafttrain.eval import advised, compared
from drafttrain.eval.advice import Advice
from drafttrain.eval.advised import stored_advice
from drafttrain.eval.interval import number
from drafttrain.eval.page import label, page, picture
from drafttrain.eval.result import AtTemperature, DrafterFigures, HeadFigures, Result
from drafttrain.eval.table import (
    CARRIES_OVER_CAPTION,
    ROUND_CAPTION,
    ROUND_COLUMNS,
    THIS_MACHINE_CAPTION,
    baseline_speeds,
    drafting_in_words,
    parity_cell,
    round_rows,
    slice_axes,
    slice_caption,
    slice_rows,
    target_in_words,
)


def write_report(folder: Path, result: Result, *, title: str, command: str) -> None:
    """Write report.html into a folder: an evaluation, with the metrics.csv of a training and the advice.json of it that are there."""
    advice = stored_advice(folder / "advice.json", result)
    template = (resources.files("drafttrain") / "eval" / "report.html").read_text(encoding="utf-8")
    html = page(template).render(
        title=title,
        result=result,
        plots=[
            *_plots_of_training(folder / "metrics.csv"),
            *_plots_of_result(result),
            *([] if advice is None else [_plot_of_advice(advice)]),
        ],
        advice=advice,
        advised=advised,
        command=command,
        carries_over=CARRIES_OVER_CAPTION,
        this_machine=THIS_MACHINE_CAPTION,
        number=number,
        parity_cell=parity_cell,
        baseline_speeds=baseline_speeds,
        drafting_in_words=drafting_in_words,
        round_caption=ROUND_CAPTION,
        round_columns=ROUND_COLUMNS,
        round_rows=round_rows,
        slice_axes=slice_axes,
        slice_caption=slice_caption,
        slice_rows=slice_rows,
        compared=compared,
        target_in_words=target_in_words,
    )
    write_text(folder / "report.html", html)


Plot = tuple[str, str, str]
"""Heading, caption, and the picture as a data URL."""


def _plot_of_advice(advice: Advice) -> Plot:
    drawing = picture(lambda axes: advised.draw(axes, advice), height=advised.HEIGHT, **advised.grid(advice))
    return "Predicted speed-up by batch", f"{advised.PICTURE_CAPTION}.", drawing


def _plots_of_training(metrics: Path) -> list[Plot]:
    if not metrics.exists():
        return []
    rows = _read(metrics)
    if any(row.get("step_ms") for row in rows):
        caption = "Loss and acceptance rate over steps; time of a step by phase, and utilization of the device."
        return [("Training", caption, picture(lambda axes: _training_and_times(axes, rows), columns=2, rows=2))]
    caption = "Loss and acceptance rate over steps."
    return [("Training", caption, picture(lambda axes: _training(axes, rows), columns=2))]


def _plots_of_result(result: Result) -> list[Plot]:
    caption = "Share of rounds that accept the i-th draft token; dashed: of those that accepted the one before it."
    plots = [("Acceptance by position", caption, picture(lambda axes: _positions(axes, result), columns=1))]
    caption = "By replay on the emitted text, with 95 % intervals over prompts; points: measured by decoding."
    drawing = picture(lambda axes: _lengths(axes, result), columns=1)
    plots.append(("Block efficiency against draft length", caption, drawing))
    part = result.greedy_or_first
    for axis in slice_axes(part):
        caption = f"Tokens per target call, temperature {part.temperature:g}, with 95 % intervals over prompts."
        drawing = picture(partial(_slices, part=part, axis=axis), columns=1)
        plots.append((f"Accepted length by {axis}", caption, drawing))
    if part.comparisons:
        caption = (
            f"Paired over prompts, temperature {part.temperature:g}, with 95 % intervals; the line: both are equal."
        )
        drawing = picture(
            lambda axes: compared.draw_pairs(axes, part), columns=2, height=max(3.2, 1.4 + 0.2 * len(part.comparisons))
        )
        plots.append(("Every pair", caption, drawing))
    if (head := result.head) is not None:
        caption = "Mean label by prediction on held-out draft tokens; a calibrated head is on the diagonal."
        plots.append(("Reliability of the head", caption, picture(lambda axes: _reliability(axes, head), columns=1)))
    return plots


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _training_and_times(axes: Sequence[Any], rows: Sequence[Mapping[str, str]]) -> None:
    _training(axes[:2], rows)
    _times(axes[2:], rows)


def _training(axes: Sequence[Any], rows: Sequence[Mapping[str, str]]) -> None:
    def series(name: str) -> tuple[list[int], list[float]]:
        chosen = [row for row in rows if row.get(name)]
        return [int(row["step"]) for row in chosen], [float(row[name]) for row in chosen]

    axes[0].plot(*series("loss"), color="#1f6f8b")
    axes[0].set(xlabel="step", ylabel="loss", title="loss")
    if rows and "validation_auc" in rows[0]:
        axes[1].plot(*series("validation_auc"), "o-", color="#c8553d", label="AUC, held-out draft tokens")
        axes[1].plot(*series("validation_ece"), "o-", color="#1f6f8b", label="ECE, held-out draft tokens")
        axes[1].set(xlabel="step", title="predictions")
    else:
        axes[1].plot(*series("acceptance_rate"), color="#1f6f8b", label="acceptance rate, training text")
        axes[1].plot(*series("validation_alpha"), "o-", color="#c8553d", label="alpha, validation prompts")
        axes[1].set(xlabel="step", title="acceptance rate")
    axes[1].legend(fontsize=8, frameon=False)


PHASES = {
    "fetch": "#b0b0b0",
    "draw": "#93b7be",
    "target": "#1f6f8b",
    "forward": "#4fa3a5",
    "backward": "#c8553d",
    "optimizer": "#e0a458",
    "validation": "#7a5c99",
    "checkpoint": "#5b7553",
}
"""Phases of a step, each a column of metrics.csv, from the bottom of the picture to the top."""


def _times(axes: Sequence[Any], rows: Sequence[Mapping[str, str]]) -> None:
    timed = [row for row in rows if row.get("step_ms")]
    steps = [int(row["step"]) for row in timed]
    heights = [[float(row.get(f"{phase}_ms") or 0) for row in timed] for phase in PHASES]
    others = [float(row["step_ms"]) - sum(parts) for row, *parts in zip(timed, *heights, strict=True)]
    axes[0].stackplot(steps, *heights, others, labels=[*PHASES, "other"], colors=[*PHASES.values(), "#e6e6e6"])
    axes[0].set(xlabel="step", ylabel="milliseconds", title="time of a step", ylim=(0, None))
    axes[0].legend(fontsize=7, framealpha=0.9, ncol=2)
    used = [(step, float(row["mfu"])) for step, row in zip(steps, timed, strict=True) if row.get("mfu")]
    if used:
        axes[1].plot(*zip(*used, strict=True), color="#1f6f8b")
        axes[1].set(xlabel="step", title="utilization (MFU)", ylim=(0, None))
    else:
        rates = [int(row["step_flops"]) / float(row["step_ms"]) / 1e9 for row in timed]
        axes[1].plot(steps, rates, color="#1f6f8b")
        axes[1].set(xlabel="step", title="needed TFLOP/s (the device's peak is unknown)", ylim=(0, None))


def _arms(result: Result) -> list[tuple[str, DrafterFigures]]:
    return [
        (label(f"{name}, temperature {part.temperature:g}"), figures)
        for part in result.temperatures
        for name, figures in part.drafters.items()
    ]


def _positions(axes: Sequence[Any], result: Result) -> None:
    for name, figures in _arms(result):
        places = range(1, len(figures.acceptance_by_position) + 1)
        (line,) = axes[0].plot(places, figures.acceptance_by_position, "o-", label=name)
        axes[0].plot(places, figures.conditional_acceptance, "--", color=line.get_color(), alpha=0.6)
    axes[0].set(xlabel="draft position", ylabel="share accepted", ylim=(0, 1))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=8, frameon=False)


def _slices(axes: Sequence[Any], part: AtTemperature, axis: str) -> None:
    for order, (name, figures) in enumerate(part.drafters.items()):
        values = list(figures.slices[axis].values())
        places = [place + 0.6 * order / len(part.drafters) for place in range(len(values))]
        reach = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        axes[0].errorbar([v.value for v in values], places, xerr=reach, fmt="o", ms=4, lw=1, label=label(name))
    names = [label(name) for name in next(iter(part.drafters.values())).slices[axis]]
    axes[0].set(xlabel="block efficiency", yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, frameon=False)


def _reliability(axes: Sequence[Any], head: HeadFigures) -> None:
    axes[0].plot([0, 1], [0, 1], ":", color="#888")
    for name, figures in head.held_out.items():
        bins = figures.reliability
        text = f"{name}, ECE {figures.ece:.3f}"
        axes[0].plot([one.predicted for one in bins], [one.observed for one in bins], "o-", label=text)
    axes[0].set(xlabel="prediction", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    axes[0].legend(fontsize=8, frameon=False)


def _lengths(axes: Sequence[Any], result: Result) -> None:
    main = result.settings["length"]
    for name, figures in _arms(result):
        if figures.length != main:
            continue  # replay is about chains: further lengths of a drafter would draw the same line again
        measured = ([main["num_draft_tokens"]], [figures.block_efficiency.value]) if main["kind"] == "fixed" else None
        if not figures.replay:
            # Replay knows neither what it drafts from nor a lossy rule's text.
            if measured is not None and not figures.lossy:
                axes[0].plot(*measured, "s", label=name)
            continue
        lengths, values = [int(k) for k in figures.replay], list(figures.replay.values())
        (line,) = axes[0].plot(lengths, [v.value for v in values], label=name)
        if not any(math.isnan(v.low) for v in values):  # one prompt has no interval
            lows, highs = [v.low for v in values], [v.high for v in values]
            axes[0].fill_between(lengths, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
        if measured is not None:
            axes[0].plot(*measured, "o", color=line.get_color())
    axes[0].set(xlabel="draft tokens per round", ylabel="block efficiency")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8, frameon=False)
