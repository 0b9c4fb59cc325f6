"""Drafters as the command line names them, local folders, hub ids or builtin ones; and length policies as eval.json has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_about
from drafttrain.config.load import load_sections
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.pipeline.folder import exported_in
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.settings import TargetSettings


def folders_of(drafters: Sequence[str]) -> list[Path]:
    """Return the local folders of drafters; of a run, the drafter that it exported.

    Raises:
        RecipeError: Naming every drafter that cannot be found.
    """
    folders, problems = [], []
    for name in drafters:
        try:
            folders.append(exported_in(resolve_folder(name)))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("arguments", problems)
    return folders


def evaluated_on(
    of_target: TargetSettings, folder: Path, *, named: str, target: str | None, overrides: Sequence[str]
) -> TargetSettings:
    """Return the settings of the target that a drafter drafts for: the given one, that of an override, else the drafter's own.

    A drafter of a run without a target drafts for the one of the settings.

    Args:
        named: How the drafter was named.
        overrides: Those that `of_target` was read with.

    Raises:
        CheckpointError: There is none, and the folder is no drafter folder.
    """
    if target is None and not any(override.startswith("target.model=") for override in overrides):
        if (about := read_about(folder)) is None:
            raise CheckpointError(f"{named}: no target is named in it. Give --target MODEL")
        target = about.target
    return replace(of_target, model=target) if target else of_target


def length_of(stored: Mapping[str, Any]) -> Any:
    """Return the settings of a length policy of an evaluation."""
    (settings,) = load_sections(["eval"], [f"eval.length={json.dumps(stored)}"])
    return settings.length
