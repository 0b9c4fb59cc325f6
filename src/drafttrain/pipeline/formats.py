"""Further formats of a drafter folder, each a folder beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import check_exported, converted, export_as, read_target_config
from drafttrain.export.settings import ExportSettings
from drafttrain.serving.engines import engine_of
from drafttrain.target_model.folders import BUILTIN, resolve_folder
from drafttrain.target_model.settings import TargetSettings

DRAFTER_FORMAT = "hf"
"""The format of the drafter folder itself."""


def folder_as(source: Path, name: str) -> Path:
    """Return where a drafter folder goes in a format: beside it."""
    return source.with_name(f"{source.name}.{name}")


def formats_of(settings: ExportSettings) -> list[str]:
    """Return the formats that are written: those asked for, and the first of every engine that reads none of them.

    The drafter folder itself is the format `hf`; an engine that wants no other reads it there.
    """

    formats = list(dict.fromkeys(settings.to))
    for name in settings.verify:
        readable = engine_of(name).formats
        if not set(readable) & set(formats) and readable[0] != DRAFTER_FORMAT:
            formats.append(readable[0])
    return formats


def target_config_of(target: TargetSettings) -> dict[str, Any]:

    return read_target_config(
        resolve_folder(target.model or "", revision=target.revision), name=name_for_engines(target)
    )


def name_for_engines(target: TargetSettings) -> str:
    """Return how files name a target to an engine, which knows no builtin one."""

    name = target.model or ""
    return str(resolve_folder(name)) if name.startswith(BUILTIN) else name


def write_formats(
    source: Path, settings: ExportSettings, target: TargetSettings, *, out: Path | None = None
) -> dict[str, Path]:
    """Write a drafter folder in every format that is asked for; return the folders by format.

    Args:
        out: Where a single format goes.
    """

    target_config = target_config_of(target)
    folders = {format: out or folder_as(source, format) for format in formats_of(settings)}
    for format in folders:
        # Nothing is written where one of them cannot be.
        converted(format, source, target_config)
    for format, folder in folders.items():
        export_as(format, source, folder, target_config=target_config)
        say(f"exported: {folder}")
    return folders


def formats_are_current(source: Path, formats: Sequence[str], target: TargetSettings) -> bool:
    """Tell whether every format is there, and is what the drafter folder gives."""

    target_config = target_config_of(target)
    try:
        for format in formats:
            check_exported(format, source, folder_as(source, format), target_config=target_config)
    except CheckpointError:
        return False
    return True
