"""Convert a drafter folder to another format: convert, check, write, read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from drafttrain.checkpoint import ABOUT, OWN_TOKENIZER, read_about
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside
from drafttrain.core.foreign import read_json
from drafttrain.core.printable import shown
from drafttrain.export import FOLDER, Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_files
from drafttrain.export.rows import with_rows_of

MAX_SHOWN = 20


def read_target_config(folder: Path, *, name: str) -> dict[str, Any]:
    """Return config.json of a target with its name (`_name_or_path`) and the folder of its weights (`FOLDER`)."""
    config = read_json(folder / "config.json")
    return config | {"_name_or_path": name, FOLDER: str(folder)}


def export_as(name: str, source: Path, folder: Path, *, target_config: Mapping[str, Any]) -> None:
    """Write a drafter folder in a format.

    Args:
        name: The format.
        source: A drafter folder as training exports it.

    Raises:
        CheckpointError: The format cannot hold this kind, or its loaders would refuse or drop something.
    """
    made = converted(name, source, target_config)
    with folder_beside(folder) as temporary:
        exporter_of(name).write(made, source, temporary)
        check_exported(name, source, temporary, target_config=target_config)
    for note in made.notes:
        say(f"{folder}: {note}")


def check_exported(name: str, source: Path, folder: Path, *, target_config: Mapping[str, Any]) -> None:
    """Check that the files of a format equal a new conversion of its drafter folder.

    Raises:
        CheckpointError: Lists every tensor and field that differs.
    """
    exporter, wanted = exporter_of(name), converted(name, source, target_config)
    held = exporter.read(folder)
    found = [f"{exporter.fields_in}: {difference}" for difference in _differences(wanted.config, held.config)]
    found += _tensor_differences(wanted.tensors, held.tensors)
    if held.kind != wanted.kind:
        found.insert(0, f"{ABOUT}: kind is {held.kind}, must be {wanted.kind}")
    found = found or exporter.problems(held, target_config)
    if found:
        raise CheckpointError(_all_problems(f"{folder}: differs from {source} converted to {name}", found))


def exporter_of(name: str) -> Exporter:
    """Return the exporter of a format.

    Raises:
        CheckpointError: No format has this name.
    """
    if name not in exporters.names():
        raise CheckpointError(exporters.unknown(name))
    exporter: Exporter = exporters.entry(name).component()
    return exporter


def converted(name: str, source: Path, target_config: Mapping[str, Any]) -> DrafterFiles:
    """Return the files of a drafter folder, converted to a format.

    Raises:
        CheckpointError: The format cannot hold this kind, or its loaders would refuse or drop something.
    """
    exporter, files, about = exporter_of(name), read_files(source), read_about(source)
    if about is not None and about.own_tokenizer:
        if name == "hf":
            return files
        raise CheckpointError(f"{source}: cannot be exported as {name}: {OWN_TOKENIZER}")
    if name != "hf" and files.config.get("drafttrain", {}).get("visual_id") is not None:
        raise CheckpointError(
            f"{source}: cannot be exported as {name}: no engine reads the projector's embeddings of images (drafter.visual)"
        )
    if files.kind not in exporter.reads:
        able = [other for other in exporters.names() if files.kind in exporter_of(other).reads]
        raise CheckpointError(
            f"{source}: {name} cannot hold drafter.kind {files.kind}, only {', '.join(exporter.reads)}. "
            + f"Formats for {files.kind}: "
            + (", ".join(f"{other} (read by {_readers(other, files.kind)})" for other in able) or "none")
        )
    files = with_rows_of(files, target_config)
    found = exporter.refusals(files, target_config)
    made = files if found else exporter.convert(files, target_config)
    if found := found or exporter.problems(made, target_config):
        raise CheckpointError(_all_problems(f"{source}: cannot be exported as {name}", found))
    return made


def _readers(name: str, kind: str) -> str:
    exporter = exporter_of(name)
    return "drafttrain eval only" if exporter.reads[kind] == "drafttrain" else exporter.readers


def _differences(wanted: Mapping[str, Any], held: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(wanted.keys() | held.keys()):
        ours, theirs = wanted.get(key), held.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += _differences(ours, theirs, prefix=f"{prefix}{key}.")
        elif key not in held:
            found.append(f"{prefix}{key} is missing, must be {shown(ours)}")
        elif key not in wanted:
            found.append(f"{prefix}{key} is {shown(theirs)}, but this key must not be there")
        elif ours != theirs:
            found.append(f"{prefix}{key} is {shown(theirs)}, must be {shown(ours)}{_first_difference(ours, theirs)}")
    return found


def _first_difference(ours: Any, theirs: Any) -> str:
    """Return where two long lists, such as vocabularies, first differ."""
    if not (isinstance(ours, list) and isinstance(theirs, list) and max(len(ours), len(theirs)) > MAX_SHOWN):
        return ""
    pairs = enumerate(zip(ours, theirs, strict=False))
    different = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
    return f": entry {different[0]} is {different[2]!r}, must be {different[1]!r}" if different else ""


def _tensor_differences(wanted: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> list[str]:
    found = []
    for name in sorted(wanted.keys() | held.keys()):
        if name not in held:
            found.append(f"{name}: missing")
        elif name not in wanted:
            found.append(f"{name}: this tensor must not be there")
        elif held[name].shape != wanted[name].shape:
            found.append(f"{name}: shape {list(held[name].shape)}, must be {list(wanted[name].shape)}")
        elif not torch.equal(held[name], wanted[name]):
            found.append(f"{name}: {int((held[name] != wanted[name]).sum())} of {wanted[name].numel()} values differ")
    return found


def _all_problems(what: str, found: list[str]) -> str:
    return "\n  ".join([f"{what}: {len(found)} problem{'s' if len(found) > 1 else ''}", *found[:MAX_SHOWN]])
