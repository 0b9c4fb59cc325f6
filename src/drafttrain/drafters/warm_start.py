"""Training that starts from a drafter folder: which settings are refused then, and which folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.target_model import Target
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.tokenizer import check_same_tokenizer, load_tokenizer

CHECKPOINT_HELP = (
    "Start from this drafter folder or hub id of the same kind (drafttrain import makes one); null: from scratch."
)


def settings_fixed_by_checkpoint(settings: Any, names: Iterable[str]) -> list[str]:
    """Return one line for every setting that is given although the checkpoint fixes it."""
    if settings.checkpoint is None:
        return []
    fresh = type(settings)()
    return [
        f"{name}: the checkpoint fixes it: leave it out"
        for name in names
        if getattr(settings, name) != getattr(fresh, name)
    ]


def checkpoint_folder(checkpoint: str, target: Target, *, kind: str) -> Path:
    """Return the folder of a drafter of this kind for this target.

    Raises:
        CheckpointError: There is none, it was not imported first, or its kind or tokenizer differs.
    """
    folder = resolve_folder(checkpoint)
    path = folder / "drafttrain.json"
    try:
        held = read_json(path).get("kind")
    except CheckpointError as error:
        raise CheckpointError(
            f"drafter.checkpoint: not a drafter folder: {error}. To convert another project's: drafttrain import FOLDER"
        ) from error
    if held != kind:
        raise CheckpointError(f"drafter.checkpoint: {checkpoint} has kind {held}, drafter.kind is {kind}")
    check_same_tokenizer(target.tokenizer, load_tokenizer(folder), drafter=checkpoint)
    return folder
