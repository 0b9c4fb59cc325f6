"""The result of a training: its best weights, and the steps whose weights are kept. Imports neither lightning nor deepspeed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """Where the best weights are, and at which step they were reached."""

    drafter: str
    """Folder of the weights, relative to that of the training."""
    best_step: int
    last_step: int
    best_by: str = ""
    """The figure that selected the best step."""
    best: float | None = None
    """That figure on held-out data; None when the recipe asks for no validation."""
    last: float | None = None


def kept_steps(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of the steps whose weights are kept, best first."""
    path = folder / "best.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [figures for figures in kept if folder_of_step(folder, figures["step"]).exists()]


def folder_of_step(folder: Path, step: int) -> Path:
    """Return the folder of a step's weights."""
    return folder / "best" / f"step-{step:08d}"
