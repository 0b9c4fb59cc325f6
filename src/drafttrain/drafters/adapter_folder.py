"""The folder of adapters on a target, in peft's format, and the target with such adapters merged in.

R = rank, I = inputs, O = outputs of a linear layer
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file

from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import read_tensors
from drafttrain.drafters.lora import LoraAdapter, added_to
from drafttrain.target_model import Target

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(adapter: LoraAdapter, folder: Path, *, target: str) -> None:
    """Write a folder that `PeftModel.from_pretrained` and serving engines load."""
    folder.mkdir()
    settings = adapter.settings
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": target,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": tensor.contiguous().cpu()
        for name, pair in adapter.tensors().items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def merged(target: Target, folder: Path) -> Target:
    """Return a copy of a target whose weights have a folder's adapters merged in.

    Raises:
        CheckpointError: The adapters do not fit the target.
    """
    try:
        config = read_json(folder / CONFIG)
        tensors = read_tensors(folder / WEIGHTS)
        scale = config["lora_alpha"] / config["r"]
    except (CheckpointError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: cannot read an adapter: {error}") from error
    model = copy.deepcopy(target.model)
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    for name in sorted(names):
        down_RI, up_OR = (tensors[f"{PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
        try:
            weight_OI = model.get_submodule(name).weight
        except AttributeError as error:
            raise CheckpointError(
                f"{folder}: {target.name} has no {name}: the adapter was made for another target"
            ) from error
        if weight_OI.shape != (up_OR.shape[0], down_RI.shape[1]):
            raise CheckpointError(
                f"{folder}: {name} of {target.name} has another shape: the adapter was made for another target"
            )
        with torch.no_grad():
            weight_OI.copy_(added_to(weight_OI, down_RI, up_OR, scale=scale))
    return Target(model, target.tokenizer, name=f"{target.name} with adapter", fingerprint=target.fingerprint)
