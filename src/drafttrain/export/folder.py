"""A drafter folder on disk: config.json, *.safetensors, the tokenizer and drafttrain.json. Most formats are such folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from drafttrain.checkpoint import read_about
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.foreign import check_folder, own_files, read_json
from drafttrain.core.tensors import check_number_types, read_tensors
from drafttrain.export.drafter_files import DrafterFiles

REPLACED = ("config.json", "README.md", "engine.json", "eval.json", "report.html")
"""Files that are not copied into the folder of another format: they are written again, or describe this folder only."""

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Endings of weight files. All of them become one file, so an index would name files that no longer exist."""


def read_files(folder: Path) -> DrafterFiles:
    """Return what is in a drafter folder.

    Raises:
        CheckpointError: It is no drafter folder, or its weights cannot be read.
    """
    check_folder(folder)
    return DrafterFiles(kind_of(folder), read_config(folder), _all_tensors(folder), folder=folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a drafter folder.

    Raises:
        CheckpointError: It is missing or cannot be read.
    """
    return read_json(folder / "config.json")


def kind_of(folder: Path) -> str:
    """Return the kind of drafter that a folder of any format holds."""
    about = read_about(folder)
    return about.kind if about else "causal_lm"


def write_folder(files: DrafterFiles, source: Path, folder: Path) -> None:
    """Write files, and copy everything else from the folder that they were made of."""
    tensors = {key: tensor.contiguous() for key, tensor in files.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", dict(files.config))
    own_files(source)
    for other in source.iterdir():
        if other.name not in REPLACED and not other.name.endswith(WEIGHTS):
            copy = shutil.copytree if other.is_dir() else shutil.copyfile
            copy(other, folder / other.name)


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no *.safetensors here (pickled weights are not read)")
    check_number_types(folder)
    return {name: tensor for path in paths for name, tensor in read_tensors(path).items()}
