"""The gate: what an export must reach, and by how much it did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.eval.table import bounds


def shortfalls(result: Mapping[str, Any], require: Mapping[str, float], *, drafter: str) -> list[str]:
    """Return one line for each figure below its floor. Figures are greedy where temperature 0 was evaluated, else of the first."""
    parts = result["temperatures"]
    part = next((p for p in parts if p["temperature"] == 0), parts[0])
    figures = part["drafters"][drafter]
    found = []
    for name, floor in require.items():
        if name == "parity":
            if floor and "parity" not in figures:
                found.append("parity: was not measured: eval.temperatures has no 0, or the rule is lossy")
            elif floor and not figures["parity"]["exact"]:
                found.append(f"parity: {figures['parity']['text']}")
            continue
        value, beside = _value(name, figures, part, drafter=drafter)
        if value is None or value != value:
            found.append(" ".join([f"{name}: was not measured", *beside]))
        elif not value >= floor:
            found.append(" ".join([f"{name}: {value:.3f}, required {floor:g}: {floor - value:.3f} short", *beside]))
    return found


def _value(
    name: str, figures: Mapping[str, Any], part: Mapping[str, Any], *, drafter: str
) -> tuple[float | None, list[str]]:
    """Return a figure; of a lower bound also the interval that it is from, and whether that is reliable."""
    if name == "gain_over_start":
        gain = part["comparisons"].get(f"{drafter} - start")
        return (gain["block_efficiency"]["low"], bounds(gain["block_efficiency"], 3)) if gain else (None, [])
    value = figures.get(name)
    return (value["value"] if isinstance(value, Mapping) else value), []
