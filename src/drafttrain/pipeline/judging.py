"""The stages after the training: export, evaluate in another process, compare with the gate, write card and report."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import GateError
from drafttrain.core.files import write_text
from drafttrain.eval.gate import shortfalls
from drafttrain.eval.report import write_report
from drafttrain.eval.result import current_result
from drafttrain.eval.table import show
from drafttrain.pipeline.evaluating import evaluate_in_new_process
from drafttrain.pipeline.formats import folder_as, formats_of
from drafttrain.pipeline.run import Run
from drafttrain.pipeline.serving import verified_in_engines, write_engine_card


def export_and_judge(run: Run) -> None:
    """Export the best weights, evaluate the files in another process, write card and report.

    Raises:
        GateError: The gate is not met; what was exported is in the folder for rejected ones.
    """
    recipe, folder = run.recipe, run.folder
    exported, rejected = folder.path / run.what, folder.rejected(run.what)
    done = run.training_result()
    result = current_result(folder.eval) if exported.exists() or rejected.exists() else None
    if result is not None:
        say("export and evaluation: done before, skipped")
        show(result)
    else:
        run.export(done)
        if not run.has_target():
            say(f"exported: {exported} (no target in this recipe, so nothing to evaluate it against)")
            return
        # The evaluation loads a target of its own: two would have to fit the device.
        run.release()
        result = evaluate_in_new_process(run)
    if done.best is not None:
        say(
            f"exported: step {done.best_step} ({done.best_by.replace('_', ' ')} {done.best:.3f} on held-out data); "
            f"last step {done.last_step} ({done.last:.3f})"
        )
    if not folder.report.exists():
        write_report(folder.path, result, title=recipe.name, command=commands_of(folder.path))
    if exported.exists():
        # An earlier export was rejected; this one is judged now.
        shutil.rmtree(rejected, ignore_errors=True)
    short = shortfalls(result, recipe.export.require, drafter="drafter")
    comparisons = verified_in_engines(run, exported if exported.exists() else rejected)
    short += [f"{one['engine']} ({one['format']}): {problem}" for one in comparisons for problem in one["problems"]]
    kept, other = (rejected, exported) if short else (exported, rejected)
    formats = formats_of(recipe.export, getattr(recipe.drafter, "kind", None))
    if other.exists():
        _move(other, kept, formats)
    write_text(kept / "README.md", run.card(result, command=command_line()))
    _write_engine_cards(kept, formats, comparisons)
    say(f"{f'{run.what}:':8} {kept}")
    say(f"report:  {folder.report}")
    if short:
        lines = "\n".join(f"  {line}" for line in short)
        raise GateError(f"gate not met, the {run.what} is in {kept}:\n{lines}")


def _move(source: Path, to: Path, formats: Sequence[str]) -> None:
    """Move an exported folder and its further formats between accepted and rejected."""
    os.replace(source, to)
    for format in formats:
        shutil.rmtree(folder_as(to, format), ignore_errors=True)
        os.replace(folder_as(source, format), folder_as(to, format))


def _write_engine_cards(folder: Path, formats: Sequence[str], comparisons: Sequence[dict[str, Any]]) -> None:
    for format in formats:
        of_format = [one for one in comparisons if one["format"] == format]
        write_engine_card(folder_as(folder, format), folder, of_format, format=format)
    if comparisons:
        write_engine_card(folder, folder, comparisons)


def command_line() -> str:
    """Return the command that this process was started with."""
    return " ".join(["drafttrain", *sys.argv[1:]])


def commands_of(folder: Path) -> str:
    """Return the commands of a run, if the folder is one, then that of this process, one a line."""
    made = folder / "provenance.json"
    runs = json.loads(made.read_text(encoding="utf-8")) if made.exists() else []
    lines = [" ".join(["drafttrain", *one["command"][1:]]) for one in runs]
    return "\n".join(dict.fromkeys([*lines, command_line()]))
