"""Drafters as the command line names them: local folders, hub ids or builtin ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.target_model.folders import resolve_folder


def folders_of(drafters: Sequence[str]) -> list[Path]:
    """Return the local folders of drafters.

    Raises:
        RecipeError: Naming every drafter that cannot be found.
    """
    folders, problems = [], []
    for name in drafters:
        try:
            folders.append(resolve_folder(name))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("arguments", problems)
    return folders
