"""Read a folder trained elsewhere: safetensors, or pickles, from which only tensors are loaded."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import check_folder, read_json
from drafttrain.core.tensors import check_finite, read_tensors
from drafttrain.importers import Given

PICKLES = ("pytorch_model*.bin", "medusa_lm_head.pt", "model.pt")


def read_given(folder: Path) -> Given:
    """Return a folder's configuration and tensors.

    Raises:
        CheckpointError: There is no config.json or no weights, a pickle holds more than tensors, or two files hold the same tensor.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    safe = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    paths = safe or pickled
    if not paths:
        raise CheckpointError(f"{folder}: no weights here (*.safetensors or {', '.join(PICKLES)})")
    tensors: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    problems = []
    for path in paths:
        for name, tensor in (read_tensors(path) if safe else read_pickle(path)).items():
            if name in tensors:
                problems.append(f"{path.name}: {name}: is in {files[name]} too")
            tensors[name], files[name] = tensor, path.name
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{folder}: the weights are there twice: remove one of the files", *problems[:20]])
        )
    if not tensors:
        raise CheckpointError(f"{folder}: no tensor in {', '.join(path.name for path in paths)}")
    unread = [path.name for path in pickled] if safe else []
    notes = [f"{', '.join(unread)}: ignored, because there are safetensors"] if unread else []
    return Given(folder, config, tensors, files, notes)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save without running code in it.

    Raises:
        CheckpointError: It holds more than tensors by name, or is damaged.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds more than tensors and could run foreign code "
            f"(torch.load with weights_only=True: {first}). Give the weights as safetensors."
        ) from error
    except Exception as error:  # a broken file can raise any exception in torch's unpickler
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path}: the weights cannot be read: {message}") from error
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path}: holds a {type(held).__name__}, must be a dict of tensors by name")
    others = [f"{name!r} ({type(value).__name__})" for name, value in held.items() if not _named_tensor(name, value)]
    if others:
        raise CheckpointError(f"{path}: must be a dict of tensors by name, holds {', '.join(others[:10])}")
    check_finite(held, where=str(path))
    # Safetensors cannot hold views of one storage, or gradients.
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def _named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
