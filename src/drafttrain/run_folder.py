"""The run folder: which recipe made it, which stages are done."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import RecipeError
from drafttrain.core.files import write_json, write_text
from drafttrain.core.provenance import provenance


class RunFolder:
    """Names of what a run leaves behind: `runs/<name>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.provenance = path / "provenance.json"
        self.data = path / "data"
        self.validation = path / "validation"
        self.pretrain = path / "pretrain"
        self.train = path
        self.train_done = path / "train.json"
        self.start = path / "start"
        self.drafter = path / "drafter"
        self.rejected = path / "drafter.rejected"
        self.head = path / "head"
        self.rejected_head = path / "head.rejected"
        self.eval = path / "eval.json"
        self.report = path / "report.html"

    def open(self, resolved: str, *, held: str | None, quiet: bool = False) -> None:
        """Take the folder for a recipe, or continue in it.

        Args:
            resolved: The recipe with every default visible.
            held: The same of the run that is already here; None: there is none.

        Raises:
            RecipeError: The folder holds a run of another recipe; the lines that differ are shown.
        """
        if held is not None:
            if held != resolved:
                changes = difflib.unified_diff(held.splitlines(), resolved.splitlines(), lineterm="", n=0)
                shown = [line for line in changes if line[:1] in "+-" and line[:3] not in ("+++", "---")]
                raise RecipeError(
                    str(self.path),
                    [
                        "this folder holds a run of another recipe; give the run another name (name=...) or remove the folder",
                        *shown,
                    ],
                )
            if not quiet:
                say(f"{self.path}: continuing")
        else:
            write_text(self.recipe, resolved)
        self._note_provenance()

    def _note_provenance(self) -> None:
        runs: list[Any] = []
        if self.provenance.exists():
            runs = json.loads(self.provenance.read_text(encoding="utf-8"))
        write_json(self.provenance, [*runs, provenance()])
