"""Drafters as the command line names them, local folders, hub ids or builtin ones; and length policies as eval.json has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drafttrain.config.load import load_sections
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


def length_of(stored: Mapping[str, Any]) -> Any:
    """Return the settings of a length policy of an evaluation."""
    (settings,) = load_sections(["eval"], [f"eval.length={json.dumps(stored)}"])
    return settings.length
