"""What scaling forms are fitted to: one point for each finished run, or for each line of a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import DataError, DrafttrainError
from drafttrain.eval.metrics import totals_of
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.sweep_result import DRAFTER, read_finished

COLUMNS = ("tokens", "parameters", "block_efficiency", "num_draft_tokens")
"""Columns that a table needs; `mbsu`, `seed` and `alpha` are optional, others are ignored."""


@dataclass(frozen=True)
class ScalingPoint:
    """A trained drafter."""

    source: str
    """Folder of the run, or file and line."""
    tokens: float
    """Read until the exported step."""
    parameters: float
    block_efficiency: float
    num_draft_tokens: float
    """Of the deepest round."""
    alpha: float
    """Accepted / drafted tokens."""
    mbsu: float
    """Memory-bound speed-up; nan: not known."""
    seed: int


def read_points(paths: Sequence[Path]) -> list[ScalingPoint]:
    """Return the points of run folders, of the runs inside of sweep folders, and of tables (.csv).

    Raises:
        DataError: Every path that holds no finished run, and every line of a table that cannot be read.
    """
    points, problems = list[ScalingPoint](), list[str]()
    for path in paths:
        try:
            if path.suffix == ".csv":
                points += _of_table(path, problems)
            else:
                points += [_of_run(folder) for folder in _run_folders(path)]
        except (DrafttrainError, OSError) as error:
            problems.append(str(error))
    depths = sorted({point.num_draft_tokens for point in points})
    if len(depths) > 1:
        problems.append(
            f"runs with {', '.join(f'{depth:g}' for depth in depths)} draft tokens: block efficiency depends on their number. "
            "Evaluate all with the same eval.length"
        )
    if problems:
        raise DataError("\n  ".join(["cannot read the runs:", *problems]) if len(problems) > 1 else problems[0])
    return points


def _run_folders(path: Path) -> list[Path]:
    """Return a run folder, or those inside of a sweep."""
    if RunFolder(path).eval.exists():
        return [path]
    inside = sorted(one.parent for one in path.glob("*/eval.json"))
    if not inside:
        raise DataError(f"{path}: no eval.json: give run folders that are finished, folders of a sweep, or .csv files")
    return inside


def _of_run(folder: Path) -> ScalingPoint:
    stored = RunFolder(folder).stored_recipe()
    finished = read_finished(folder, seed=0 if stored is None else stored.seed)
    run, result = finished.run, finished.result
    figures = result.greedy_or_first.drafters[DRAFTER]
    totals = totals_of(figures.prompts)
    exported = [point.tokens for point in run.curve if point.step == run.exported_step]
    return ScalingPoint(
        source=str(folder),
        tokens=exported[0] if exported else run.tokens,
        parameters=result.drafters[DRAFTER].parameters,
        block_efficiency=totals.block_efficiency,
        num_draft_tokens=len(totals.reached_at),
        alpha=totals.draft_acceptance_rate,
        mbsu=figures.mbsu,
        seed=run.seed,
    )


def _of_table(path: Path, problems: list[str]) -> Iterator[ScalingPoint]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path}: lacks the columns {', '.join(missing)}")
        for number, row in enumerate(reader, 2):
            try:
                yield ScalingPoint(
                    source=f"{path}:{number}",
                    **{name: _positive(row, name) for name in COLUMNS},
                    alpha=float(row.get("alpha") or "nan"),
                    mbsu=float(row.get("mbsu") or "nan"),
                    seed=int(row.get("seed") or 0),
                )
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")


def _positive(row: dict[str, str], name: str) -> float:
    value = float(row[name] or "nan")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {row[name]!r:.40}")
    return value
