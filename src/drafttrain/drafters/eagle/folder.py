"""The folder of an EAGLE drafter: config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import load_into
from drafttrain.drafters.eagle.config_problems import config_problems
from drafttrain.target_model import Target


def save_folder(folder: Path, config: dict[str, Any], module: nn.Module) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path, target: Target, *, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a drafter folder that fits this target.

    Args:
        own: Defaults of the kind's own fields.

    Raises:
        CheckpointError: It has another width or vocabulary, or it is not a drafter folder of this project.
    """
    config = read_json(folder / "config.json")
    if "drafttrain" not in config:
        raise CheckpointError(
            f"{folder}/config.json: no key drafttrain: written for an engine or by another project. "
            f"Run drafttrain import {folder} to convert it"
        )
    if problems := config_problems(config, own):
        raise CheckpointError("\n  ".join([f"{folder}: this drafter cannot be loaded", *problems]))
    width, vocabulary = int(target.model.config.get_text_config().hidden_size), target.vocab_size
    for key, wanted in (("hidden_size", width), ("vocab_size", vocabulary)):
        if config.get(key) != wanted:
            raise CheckpointError(
                f"{folder}/config.json: {key} is {config.get(key)}, this target, {target.name}, has {wanted}"
            )
    return config


def load_weights(folder: Path, module: nn.Module, *, dtype: Any) -> None:
    """Read model.safetensors into a module with exactly these names and shapes; weights become `dtype`."""
    module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    load_into(module, folder / "model.safetensors")
