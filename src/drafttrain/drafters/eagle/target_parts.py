"""What a drafter that reads features takes of its target: embedding and head, shared and frozen, and the size of its layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.batches import Head
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import load_into
from drafttrain.drafters.eagle.config_problems import config_problems
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm
from drafttrain.target_model.logits import head_logits, head_of
from drafttrain.target_model.matrix_products import head_parameters

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")
"""Kinds of rotary scaling that one layer of Llama's can take over."""

ENDLESS = 1 << 20
"""Positions that a drafter has whose target names no end of its own: rotary angles know none."""


def positions_of(config: Any) -> int | None:
    """Return the positions that a target's configuration names: engines serve no text beyond them, nor beyond the drafter's own."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class TargetParts:
    """The target's embedding and head. No module, so that neither is trained nor saved with the drafter."""

    def __init__(self, target: Target) -> None:
        self._model = target.model
        self._embedding: Any = target.model.get_input_embeddings()

    def embed(self, tokens_BT: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return embedded_BTD."""
        with torch.no_grad():
            embedded_BTD: Tensor = self._embedding(tokens_BT.to(self._embedding.weight.device))
        return embedded_BTD.to(tokens_BT.device, dtype)

    def head(self, states_ND: Tensor) -> Tensor:
        """Return logits_NV, differentiable in the states."""
        return head_logits(self._model, states_ND.to(self._model.get_output_embeddings().weight.dtype))

    @property
    def linear_head(self) -> Head:
        """The head, in its parts where it is a plain matrix."""
        return head_of(self._model)

    def head_rows(self, ids_R: Tensor) -> Tensor:
        """Return the head's rows of some tokens."""
        weight_VD = self._model.get_output_embeddings().weight.detach()
        rows_RD: Tensor = weight_VD[ids_R.to(weight_VD.device)]
        return rows_RD

    def final_gain(self) -> Tensor:
        """Return gain_D, what the final norm multiplies a normed state by: ones where it has no weight."""
        norm: Any = final_norm(self._model)
        embedding = self._embedding.weight
        # Of a state of one size everywhere and its opposite, so that neither a bias nor what the norm calls its weight matters;
        # a large one, so that its epsilon does not.
        sign_D = (1 - 2 * (torch.arange(embedding.shape[1], device=embedding.device) % 2)).to(embedding.dtype)
        with torch.no_grad():
            up_D, down_D = norm(torch.stack([1024 * sign_D, -1024 * sign_D])[None])[0]
        gain_D: Tensor = (up_D - down_D) / (2 * sign_D)
        return gain_D

    @property
    def embedding_row_bytes(self) -> int:
        """Bytes that one token reads of the embedding."""
        weight = self._embedding.weight
        return int(weight.shape[1] * weight.element_size())

    @property
    def head_parameters(self) -> int:
        """Parameters of the head."""
        return head_parameters(self._model)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""
        return weight_bytes(self._model.get_output_embeddings())


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all parameters of modules."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def layer_config(
    target: Target, *, num_heads: int | None, num_kv_heads: int | None, intermediate_size: int | None
) -> dict[str, Any]:
    """Return the fields of LlamaConfig for one layer on this target: its width, and what the settings leave out, are its own.

    Raises:
        CheckpointError: The heads do not divide the target's width.
    """
    config = target.model.config.get_text_config()
    hidden_size = int(config.hidden_size)
    heads = num_heads or int(config.num_attention_heads)
    if num_heads and hidden_size % num_heads:
        raise CheckpointError(f"drafter.num_heads: {num_heads} does not divide the target's width {hidden_size}")
    own = None if num_heads else getattr(config, "head_dim", None)
    kv_heads = num_kv_heads or (heads if num_heads else getattr(config, "num_key_value_heads", None) or heads)
    if heads % kv_heads:
        raise CheckpointError(f"drafter.num_kv_heads: {kv_heads} does not divide {heads} heads")
    fields = one_layer(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or getattr(config, "intermediate_size", None) or 4 * hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(own or hidden_size // heads),
        rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
        max_position_embeddings=positions_of(config) or ENDLESS,
        rope=_rope_parameters(config),
    )
    return {**fields, "vocab_size": target.vocab_size}


def one_layer(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    rms_norm_eps: float,
    max_position_embeddings: int,
    rope: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of LlamaConfig for one layer of these sizes, without biases.

    Args:
        rope: `rope_parameters` of transformers 5.
    """
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": rms_norm_eps,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": dict(rope),
        # Engines of before transformers 5 read these two.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None
        if rope["rope_type"] == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def llama_config(fields: dict[str, Any]) -> Any:
    """Return the LlamaConfig of one layer."""
    from transformers import LlamaConfig

    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_hidden_layers",
        "initializer_range",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
    )
    return LlamaConfig(**{name: fields[name] for name in names if name in fields})


def save_folder(folder: Path, config: dict[str, Any], module: nn.Module) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path, target: Target, *, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of a folder that was made for targets of this width.

    Args:
        own: The kind's own fields, as they are by default.

    Raises:
        CheckpointError: It was not, or it is no folder of ours.
    """
    config = read_json(folder / "config.json")
    if "drafttrain" not in config:
        raise CheckpointError(
            f"{folder}/config.json: no key drafttrain: written for an engine or by others; drafttrain import {folder} "
            "makes a drafter folder of it"
        )
    if problems := config_problems(config, own):
        raise CheckpointError("\n  ".join([f"{folder}: not a drafter that can be read", *problems]))
    width, vocabulary = int(target.model.config.get_text_config().hidden_size), target.vocab_size
    for key, wanted in (("hidden_size", width), ("vocab_size", vocabulary)):
        if config.get(key) != wanted:
            raise CheckpointError(
                f"{folder}/config.json: {key} is {config.get(key)}, this target, {target.name}, has {wanted}"
            )
    return config


def load_weights(folder: Path, module: nn.Module, *, dtype: Any) -> None:
    """Read model.safetensors into a module of exactly these names and shapes, as weights of `dtype`."""
    module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    load_into(module, folder / "model.safetensors")


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the target's rotary base and scaling; the base alone where its scaling is none that a Llama layer has."""
    given = getattr(config, "rope_parameters", None) or {}
    given = given.get("full_attention", given)
    theta = given.get("rope_theta", 10000.0)
    if given.get("rope_type", "default") not in ROPE_SCALINGS:
        return {"rope_type": "default", "rope_theta": theta}
    return {key: value for key, value in given.items() if key != "partial_rotary_factor"} | {"rope_theta": theta}
