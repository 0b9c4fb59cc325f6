"""The gate: figures that an export must reach, and by how much it misses them."""

from __future__ import annotations

from collections.abc import Mapping

from drafttrain.eval.interval import Interval
from drafttrain.eval.result import AtTemperature, DrafterFigures, Result


def shortfalls(result: Result, require: Mapping[str, float], *, drafter: str) -> list[str]:
    """Return one line for each figure below its floor: greedy figures where temperature 0 was evaluated, else the first ones."""
    part = result.greedy_or_first
    figures = part.drafters[drafter]
    found = []
    for name, floor in require.items():
        if name == "parity":
            found += _parity_shortfall(figures) if floor else []
            continue
        value, beside = _value(name, figures, part, drafter=drafter)
        if value != value:
            found.append(" ".join([f"{name}: not measured", *beside]))
        elif not value >= floor:
            found.append(" ".join([f"{name}: {value:.3f}, required {floor:g}: {floor - value:.3f} short", *beside]))
    return found


def _parity_shortfall(figures: DrafterFigures) -> list[str]:
    if figures.parity is None:
        return ["parity: not measured: eval.temperatures has no 0, or the rule is lossy"]
    return [] if figures.parity.lossless else [f"parity: {figures.parity.text}"]


def _value(name: str, figures: DrafterFigures, part: AtTemperature, *, drafter: str) -> tuple[float, list[str]]:
    """Return a figure; for a lower bound also its interval, with a note where that is not reliable."""
    if name == "gain_over_start":
        gain = part.comparisons.get(f"{drafter} - start")
        return (gain.block_efficiency.low, gain.block_efficiency.bounds(3)) if gain else (float("nan"), [])
    value = getattr(figures, name)
    return (value.value if isinstance(value, Interval) else value), []
