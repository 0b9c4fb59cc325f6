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
    target: str = ""
    """Fingerprint of the run's target; empty: not known."""


def read_points(paths: Sequence[Path]) -> list[ScalingPoint]:
    """Return the points of run folders, of the runs inside of sweep folders, and of tables (.csv).

    Raises:
        DataError: Every path that holds no finished run, and every line of a table that cannot be read.
    """
    points, problems = list[ScalingPoint](), list[str]()
    folders = dict[Path, None]()
    for path in paths:
        try:
            if path.suffix == ".csv":
                points += _of_table(path, problems)
            else:
                # A run that is named beside its sweep counts once.
                folders |= dict.fromkeys(folder.resolve() for folder in _run_folders(path))
        except (DrafttrainError, OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append(str(error) if isinstance(error, DrafttrainError) else f"{path}: {error}")
    for folder in folders:
        try:
            points.append(_of_run(folder))
        except (DrafttrainError, OSError) as error:
            problems.append(str(error))
    targets = {point.target for point in points if point.target}
    if len(targets) > 1:
        problems.append(f"runs of {len(targets)} different targets: a form is of one target")
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
    if result.lossy:
        raise DataError(f"{folder}: eval.rule is lossy: its block efficiency is not that of the target's own text")
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
        target=result.target.fingerprint,
    )


def _of_table(path: Path, problems: list[str]) -> Iterator[ScalingPoint]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path}: lacks the columns {', '.join(missing)}")
        for number, row in enumerate(reader, 2):
            try:
                tokens, parameters, efficiency, depth = (_positive(row, name) for name in COLUMNS)
                point = ScalingPoint(
                    source=f"{path}:{number}",
                    tokens=tokens,
                    parameters=parameters,
                    block_efficiency=efficiency,
                    num_draft_tokens=depth,
                    alpha=_positive(row, "alpha") if row.get("alpha") else math.nan,
                    mbsu=_positive(row, "mbsu") if row.get("mbsu") else math.nan,
                    seed=int(row.get("seed") or 0),
                )
                if not 1 <= point.block_efficiency <= point.num_draft_tokens + 1:
                    raise ValueError(
                        f"block_efficiency must be in 1..num_draft_tokens + 1, got {point.block_efficiency:g}"
                    )
                yield point
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")


def _positive(row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name] or "nan")
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {row[name]!r:.40}")
    return value
