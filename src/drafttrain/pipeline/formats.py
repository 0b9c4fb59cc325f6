"""Further formats of a drafter folder, each a folder beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import check_exported, converted, export_as, read_target_config
from drafttrain.export.folder import kind_of
from drafttrain.export.settings import ExportSettings
from drafttrain.serving.engines import engine_of
from drafttrain.target_model.folders import resolve_folder, stands_for_folder
from drafttrain.target_model.settings import TargetSettings

DRAFTER_FORMAT = "hf"
"""The format of the drafter folder itself."""


def folder_as(source: Path, name: str) -> Path:
    """Return the folder of a drafter in a further format, beside its own."""
    return source.with_name(f"{source.name}.{name}")


def formats_of(settings: ExportSettings, kind: str | None) -> list[str]:
    """Return the formats to write: those of `export.to`, and one for each engine that reads none of these.

    The drafter folder itself is the format `hf`; engines that read it need no other.

    Args:
        kind: Kind of the drafter; None: not known.
    """
    formats = list(dict.fromkeys(settings.to))
    for name in settings.verify:
        readable = engine_of(name).formats_for(kind)
        if readable and not set(readable) & set(formats) and readable[0] != DRAFTER_FORMAT:
            formats.append(readable[0])
    return formats


def target_config_of(target: TargetSettings) -> dict[str, Any]:
    """Return the configuration of a target, with the name that files for engines give it."""
    return read_target_config(
        resolve_folder(target.model or "", revision=target.revision), name=name_for_engines(target)
    )


def name_for_engines(target: TargetSettings) -> str:
    """Return the name of the target in files for engines: a builtin or known one, and a GGUF file, by the folder that engines can load."""
    name = target.model or ""
    return str(resolve_folder(name)) if stands_for_folder(name) else name


def write_formats(
    source: Path, settings: ExportSettings, target: TargetSettings, *, out: Path | None = None
) -> dict[str, Path]:
    """Write a drafter folder in every format of the settings; return the folders by format.

    Args:
        out: Folder of a single format.
    """
    target_config = target_config_of(target)
    folders = {format: out or folder_as(source, format) for format in formats_of(settings, kind_of(source))}
    for format in folders:
        # If one format cannot be written, none is.
        converted(format, source, target_config)
    for format, folder in folders.items():
        export_as(format, source, folder, target_config=target_config)
        say(f"exported: {folder}")
    return folders


def formats_are_current(source: Path, formats: Sequence[str], target: TargetSettings) -> bool:
    """Return whether every format exists and matches the drafter folder."""
    target_config = target_config_of(target)
    try:
        for format in formats:
            check_exported(format, source, folder_as(source, format), target_config=target_config)
    except CheckpointError:
        return False
    return True
