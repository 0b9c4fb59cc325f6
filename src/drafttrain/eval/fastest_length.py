"""The draft length that an evaluation measured to be the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafttrain.eval.result import DrafterFigures, Result, current_result


def fastest_length(folder: Path, *, temperature: float) -> Mapping[str, Any] | None:
    """Return the length policy with the highest measured speed-up in the eval.json of a drafter or of its run.

    The nearest temperature that was evaluated counts. A policy that reads a head is not returned: its folder may be elsewhere.

    Returns:
        Kind and settings; None: there is no evaluation.
    """
    for path in (folder / "eval.json", folder.parent / "eval.json"):
        if (result := current_result(path)) is not None and (arms := _arms(result, temperature)):
            return max(arms, key=lambda figures: figures.speedup.value).length
    return None


def _arms(result: Result, temperature: float) -> list[DrafterFigures]:
    """Return the lossless figures of the judged drafter at each draft length."""
    part = min(result.temperatures, key=lambda one: abs(one.temperature - temperature))
    judged = next(iter(result.drafters))
    return [
        figures
        for name, figures in part.drafters.items()
        if (name == judged or name.startswith(f"{judged} (")) and not figures.lossy and not figures.length.get("head")
    ]
