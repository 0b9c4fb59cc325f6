"""Drafters side by side: the one table of `drafttrain compare`, every pair, and the slices of the prompts; their picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from drafttrain.eval.interval import Interval, number
from drafttrain.eval.page import label
from drafttrain.eval.result import AtTemperature

ARM_COLUMNS = (
    *("temperature", "drafter", "block efficiency", "macro", "speed-up", "macro"),
    *("difference", "to", "p", "permutation p"),
)
ARM_CAPTION = (
    "Block efficiency and speed-up over the baseline: of all tokens together, and as the mean over prompts (macro); the "
    "difference in block efficiency is paired over prompts"
)
PAIR_COLUMNS = (
    *("temperature", "first - second", "block efficiency", "macro", "p", "permutation p"),
    "tokens/s, first / second",
)
PAIR_CAPTION = "Every pair, paired over prompts: the difference in block efficiency, and the quotient of speeds"
SLICE_COLUMNS = ("temperature", "first - second", "by", "slice", "block efficiency", "permutation p", "Holm p")
SLICE_CAPTION = "Every pair by slice; Holm p: corrected for all slices of the same axis"


def arm_rows(part: AtTemperature) -> Iterator[list[str]]:
    """Yield a row for each drafter; its difference is to the first one of the same draft length, or to itself at the first."""
    names = list(part.drafters)
    for name, figures in part.drafters.items():
        macro = figures.macro
        row = [
            f"{part.temperature:g}",
            f"{name} (LOSSY)" if figures.lossy else name,
            figures.block_efficiency.text(),
            "-" if macro is None else number(macro.block_efficiency.value),
            figures.speedup.text(),
            "-" if macro is None else number(macro.speedup.value),
        ]
        other = next((one for one in names if f"{one} - {name}" in part.comparisons), None)
        if other is None:
            yield [*row, "-", "-", "-", "-"]
            continue
        found = part.comparisons[f"{other} - {name}"]
        difference = _signed(_reversed(found.block_efficiency))
        yield [*row, difference, other, p_cell(found.p_value), p_cell(found.permutation_p_value)]


def pair_rows(part: AtTemperature) -> Iterator[list[str]]:
    """Yield a row for each pair."""
    for name, found in part.comparisons.items():
        yield [
            f"{part.temperature:g}",
            name,
            _signed(found.block_efficiency),
            "-" if found.macro is None else _signed(found.macro),
            p_cell(found.p_value),
            p_cell(found.permutation_p_value),
            "-" if found.speed is None else found.speed.text(),
        ]


def compared_slice_rows(part: AtTemperature, *, below: float = 1.0) -> Iterator[list[str]]:
    """Yield a row for each pair and slice.

    Args:
        below: Largest corrected p-value; 1: also slices of one prompt, which have none.
    """
    for pair, found in part.comparisons.items():
        for axis, slices in (found.slices or {}).items():
            for name, one in slices.items():
                if below == 1 or one.holm_p_value <= below:
                    shown = [name or "(none)", _signed(one.block_efficiency)]
                    p_values = [p_cell(one.permutation_p_value), p_cell(one.holm_p_value)]
                    yield [f"{part.temperature:g}", pair, axis, *shown, *p_values]


def p_cell(value: float | None) -> str:
    """Return a p-value; `n/a` where there is one prompt, or an earlier version did not compute it."""
    return "n/a" if value is None or value != value else f"{value:.3g}"


def draw_pairs(axes: Sequence[Any], part: AtTemperature) -> None:
    """Draw the difference of every pair with its interval, and the quotient of their speeds."""
    names = list(part.comparisons)
    found = list(part.comparisons.values())
    _draw_intervals(axes[0], [one.block_efficiency for one in found], equal=0.0)
    axes[0].set(xlabel="block efficiency, first - second", yticks=range(len(names)))
    axes[0].set_yticklabels([label(name) for name in names], fontsize=8)
    _draw_intervals(axes[1], [one.speed for one in found], equal=1.0)
    axes[1].set(xlabel="tokens/s, first / second", yticks=range(len(names)), yticklabels=[""] * len(names))
    for ax in axes[:2]:
        ax.invert_yaxis()


def _draw_intervals(ax: Any, found: Sequence[Interval | None], *, equal: float) -> None:
    for place, one in enumerate(found):
        if one is not None:
            reach = None if one.low != one.low else [[one.value - one.low], [one.high - one.value]]
            ax.errorbar([one.value], [place], xerr=reach, fmt="o", ms=4, lw=1, color="#1f6f8b")
    ax.axvline(equal, color="#888", lw=0.8)


def _reversed(found: Interval) -> Interval:
    """Return the interval of second - first."""
    return Interval(-found.value, -found.high, -found.low, found.num_prompts)


def _signed(found: Interval) -> str:
    return " ".join([f"{found.value:+.3f}", *found.bounds(3)])
