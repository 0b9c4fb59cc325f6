"""A sweep as a table (sweep.md, terminal) and as a picture (sweep.png): block efficiency against tokens and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say, table
from drafttrain.core.files import write_json, write_text
from drafttrain.eval.interval import Interval, number, p_value
from drafttrain.eval.page import label, write_picture
from drafttrain.eval.typed_json import to_json
from drafttrain.export.markdown import plain
from drafttrain.pipeline.sweep_result import ArmFigures, SweepResult

MOST_IN_LEGEND = 20
INCHES_AN_ARM = 0.2
CELL = 40
"""Most characters of a setting in a cell."""


def write_sweep(folder: Path, result: SweepResult) -> None:
    """Write sweep.json, sweep.md and sweep.png."""
    write_json(folder / "sweep.json", to_json(result))
    write_text(folder / "sweep.md", markdown(result))
    if result.arms:
        height = max(3.6, 1.6 + INCHES_AN_ARM * len(result.arms))
        write_picture(folder / "sweep.png", lambda axes: _draw(axes, result), columns=3, height=height)


def show_sweep(result: SweepResult) -> None:
    """Print the table on stdout and the notes on stderr; `*` marks the largest block efficiency."""
    table(_rows(result, lambda cell: f"{cell} *"), columns=_columns(result), title="\nSweep")
    for note in (*_about(result), *result.notes):
        say(note)


def markdown(result: SweepResult) -> str:
    """Return the sweep as a Markdown page."""
    columns = _columns(result)
    rows = _rows(result, lambda cell: f"**{cell}**", escaped=plain)
    lines = [
        f"# Sweep of {plain(result.recipe)}",
        "",
        f"| {' | '.join(map(plain, columns))} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *(f"- {plain(note)}" for note in (*_about(result), *result.notes)),
        *(f"- FAILED: {plain(name)}: {plain(error)}" for name, error in result.failed.items()),
        "",
        *(["![Block efficiency against tokens and seconds](sweep.png)", ""] if result.arms else []),
        f"Command: `{' '.join(map(plain, result.provenance['command']))}`, {result.provenance['date']}, commit "
        f"{result.provenance['commit'] or 'unknown'}, {plain(result.provenance['machine']['processor'])}.",
    ]
    return "\n".join(lines) + "\n"


def _about(result: SweepResult) -> list[str]:
    """Return what the figures of the table mean."""
    seeds = f", counts summed over the seeds {', '.join(map(str, result.seeds))}" if len(result.seeds) > 1 else ""
    lines = [
        f"block efficiency on {result.num_prompts} test prompts that all arms decoded{seeds}; brackets: 95 % intervals over prompts",
        f"difference: to {result.baseline}, paired over prompts",
        "validated: block efficiency of the exported step by replay on the validation prompts",
    ]
    if result.num_prompts_of_some:
        lines.append(f"{result.num_prompts_of_some} further prompts were decoded by some arms only and do not count")
    return lines if result.arms else ["no arm is finished"]


def _columns(result: SweepResult) -> list[str]:
    names = [*result.axes, "tokens", "seconds", "validated"]
    for part in result.arms[0].temperatures if result.arms else ():
        at = f"T={part.temperature:g}"
        names += [f"{at} block efficiency", *(["by seed"] if len(result.seeds) > 1 else [])]
        names += [f"{at} acceptance", f"{at} difference"]
    return names


def _rows(result: SweepResult, marked: Callable[[str], str], *, escaped: Callable[[str], str] = str) -> list[list[str]]:
    """Return the cells of each arm.

    Args:
        marked: Marks the cell of the largest block efficiency of a column.
        escaped: Makes text from outside safe.
    """
    best = [
        max(
            (part.block_efficiency.value for arm in result.arms if not (part := arm.temperatures[i]).lossy),
            default=math.nan,
        )
        for i in range(len(result.arms[0].temperatures) if result.arms else 0)
    ]
    rows = []
    for arm in result.arms:
        cells = [escaped(_shortened(value)) for value in arm.settings.values()]
        cells += [f"{arm.tokens:,.0f}", f"{arm.seconds:,.0f}", number(arm.validated, 3)]
        for part, largest in zip(arm.temperatures, best, strict=True):
            shown = part.block_efficiency.text(3)
            if part.lossy:
                cells.append(f"{shown} (lossy)")
            else:
                cells.append(marked(shown) if part.block_efficiency.value == largest else shown)
            if len(result.seeds) > 1:
                cells.append(", ".join(f"{value:.2f}" for value in part.by_seed))
            cells.append(number(part.draft_acceptance_rate, 3))
            found = part.difference
            cells.append("-" if found is None else f"{found.block_efficiency.text(3)} {p_value(found.p_value)}")
        rows.append(cells)
    return rows


def _shortened(text: str) -> str:
    return text if len(text) <= CELL else f"{text[: CELL - 3]}..."


def _draw(axes: Sequence[Any], result: SweepResult) -> None:
    colours = _colours(len(result.arms))
    for arm, colour in zip(result.arms, colours, strict=True):
        _curves(axes[:2], arm, colour)
    axes[0].set(xlabel="tokens trained", ylabel="block efficiency")
    axes[1].set(xlabel="seconds of training", ylabel="block efficiency")
    if len(result.arms) <= MOST_IN_LEGEND:
        axes[0].figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False
        )
    _differences(axes[2], result, colours)


def _curves(axes: Sequence[Any], arm: ArmFigures, colour: Any) -> None:
    """Draw the validated curve of an arm with its intervals, and its end on the test prompts, against tokens and seconds."""
    values, lows, highs = ([getattr(p, name) for p in arm.curve] for name in ("block_efficiency", "low", "high"))
    ends = [part.block_efficiency.value for part in arm.temperatures[:1]]
    for ax, what in zip(axes, ("tokens", "seconds"), strict=True):
        places = [getattr(point, what) for point in arm.curve]
        ax.plot(places, values, "o-", ms=3, lw=1, color=colour, label=label(arm.name))
        ax.fill_between(places, lows, highs, color=colour, alpha=0.15, lw=0)
        ax.plot([getattr(arm, what)] * len(ends), ends, "D", ms=6, mfc="none", color=colour)
    axes[0].set_title("lines: validation prompts, 95 %; diamonds: test prompts", fontsize=8)


def _differences(ax: Any, result: SweepResult, colours: Sequence[Any]) -> None:
    """Draw the paired differences to the baseline, with their intervals, at the first temperature."""
    for place, (arm, colour) in enumerate(zip(result.arms, colours, strict=True)):
        for part in arm.temperatures[:1]:
            same = Interval(0.0, 0.0, 0.0)
            found = part.difference.block_efficiency if part.difference else same
            reach = [[found.value - found.low], [found.high - found.value]]
            known = not math.isnan(found.low)
            ax.errorbar([found.value], [place], xerr=reach if known else None, fmt="D", ms=4, lw=1, color=colour)
    ax.axvline(0, color="#888", lw=0.8)
    first = result.arms[0].temperatures
    at = f", temperature {first[0].temperature:g}" if first else ""
    ax.set_title(f"difference to {label(result.baseline)}{at}", fontsize=8)
    ax.set(xlabel="block efficiency, paired over test prompts, 95 %", yticks=range(len(result.arms)))
    ax.set_yticklabels([label(arm.name) for arm in result.arms], fontsize=6)
    ax.invert_yaxis()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab20" if count > 10 else "tab10"](i % 20) for i in range(count)]
