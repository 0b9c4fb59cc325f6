"""From a drafter folder to the folder of another format: converted, checked, written, read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from drafttrain.checkpoint import ABOUT, read_about
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside, write_json
from drafttrain.core.tensors import read_tensors
from drafttrain.export import DrafterFiles, Exporter, exporters

REPLACED = ("config.json", "model.safetensors", "README.md", "engine.json", "eval.json", "report.html")
"""Files of a drafter folder that are not copied: made anew, or told of the other folder."""


def read_files(folder: Path) -> DrafterFiles:
    """Return what is in a drafter folder.

    Raises:
        CheckpointError: It is none, or its weights cannot be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not the configuration of a drafter: {error}") from error
    about = read_about(folder)
    return DrafterFiles(about.kind if about else "causal_lm", config, _all_tensors(folder))


def read_target_config(folder: Path, *, name: str) -> dict[str, Any]:
    """Return config.json of a target, with the name that it goes by."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config | {"_name_or_path": name}


def export_as(name: str, source: Path, folder: Path, *, target_config: Mapping[str, Any]) -> None:
    """Write a drafter folder in a format.

    Args:
        name: The format.
        source: A drafter folder as training exports it.

    Raises:
        CheckpointError: The format has no place for this kind, or a loader of it would refuse or drop something.
    """
    made = converted(name, source, target_config)
    with folder_beside(folder) as temporary:
        tensors = {key: tensor.contiguous() for key, tensor in made.tensors.items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", dict(made.config))
        for other in source.iterdir():
            if other.name not in REPLACED and other.suffix != ".safetensors":
                copy = shutil.copytree if other.is_dir() else shutil.copyfile
                copy(other, temporary / other.name)
        check_exported(name, source, temporary, target_config=target_config)
    for note in made.notes:
        say(f"{folder}: {note}")


def check_exported(name: str, source: Path, folder: Path, *, target_config: Mapping[str, Any]) -> None:
    """Hold the files of a format against the drafter folder that they were made from.

    Raises:
        CheckpointError: Naming every tensor and field that is not what the source gives.
    """
    wanted = converted(name, source, target_config)
    held = read_files(folder)
    found = [*_config_differences(wanted.config, held.config), *_tensor_differences(wanted.tensors, held.tensors)]
    if held.kind != wanted.kind:
        found.insert(0, f"{ABOUT}: kind is {held.kind}, must be {wanted.kind}")
    found = found or exporter_of(name).problems(held, target_config)
    if found:
        raise CheckpointError(_told(f"{folder}: not what {source} gives as {name}", found))


def exporter_of(name: str) -> Exporter:
    """Return the exporter of a format.

    Raises:
        CheckpointError: There is none.
    """
    if name not in exporters.names():
        raise CheckpointError(exporters.unknown(name))
    exporter: Exporter = exporters.entry(name).component()
    return exporter


def converted(name: str, source: Path, target_config: Mapping[str, Any]) -> DrafterFiles:
    """Return a drafter folder's files in a format.

    Raises:
        CheckpointError: The format has no place for this kind, or a loader of it would refuse or drop something.
    """
    exporter, files = exporter_of(name), read_files(source)
    if files.kind not in exporter.reads:
        able = [other for other in exporters.names() if files.kind in exporter_of(other).reads]
        raise CheckpointError(
            f"{source}: {name} has no place for drafter.kind {files.kind}, only for {', '.join(exporter.reads)}. "
            + f"Formats for {files.kind}: "
            + ", ".join(f"{other} (read by {_readers(other, files.kind)})" for other in able)
        )
    made = exporter.convert(files, target_config)
    if found := exporter.problems(made, target_config):
        raise CheckpointError(_told(f"{source}: cannot be exported as {name}", found))
    return made


def _readers(name: str, kind: str) -> str:
    exporter = exporter_of(name)
    return "drafttrain eval alone" if exporter.reads[kind] == "drafttrain" else exporter.readers


def _config_differences(wanted: Mapping[str, Any], held: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(wanted.keys() | held.keys()):
        ours, theirs = wanted.get(key), held.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += _config_differences(ours, theirs, prefix=f"{prefix}{key}.")
        elif key not in held:
            found.append(f"config.json: {prefix}{key} is missing, must be {ours!r}")
        elif key not in wanted:
            found.append(f"config.json: {prefix}{key} is {theirs!r}: there must be no such key")
        elif ours != theirs:
            found.append(f"config.json: {prefix}{key} is {theirs!r}, must be {ours!r}")
    return found


def _tensor_differences(wanted: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> list[str]:
    found = []
    for name in sorted(wanted.keys() | held.keys()):
        if name not in held:
            found.append(f"{name}: missing")
        elif name not in wanted:
            found.append(f"{name}: there must be no such tensor")
        elif held[name].shape != wanted[name].shape:
            found.append(f"{name}: shape {list(held[name].shape)}, must be {list(wanted[name].shape)}")
        elif not torch.equal(held[name], wanted[name]):
            found.append(f"{name}: {int((held[name] != wanted[name]).sum())} of {wanted[name].numel()} values differ")
    return found


def _told(what: str, found: list[str]) -> str:
    return "\n  ".join([f"{what}: {len(found)} problem{'s' if len(found) > 1 else ''}", *found[:20]])


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no *.safetensors here (pickled weights are not read)")
    return {name: tensor for path in paths for name, tensor in read_tensors(path).items()}
