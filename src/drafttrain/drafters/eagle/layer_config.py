"""The configuration of an EAGLE drafter's one layer, as fields of LlamaConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model import Target
from drafttrain.target_model.positions import UNLIMITED_POSITIONS, max_positions

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")
"""Kinds of rotary scaling that a Llama layer supports."""


def layer_config(
    target: Target,
    *,
    num_heads: int | None,
    num_kv_heads: int | None,
    intermediate_size: int | None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """Return the fields of LlamaConfig for one layer on this target. Width and unset sizes are the target's.

    Raises:
        CheckpointError: The heads do not divide the target's width.
    """
    config = target.model.config.get_text_config()
    hidden_size = int(config.hidden_size)
    heads = num_heads or int(config.num_attention_heads)
    if num_heads and not head_dim and hidden_size % num_heads:
        raise CheckpointError(f"drafter.num_heads: {num_heads} does not divide the target's width {hidden_size}")
    own = head_dim or (None if num_heads else getattr(config, "head_dim", None))
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
        max_position_embeddings=max_positions(config) or UNLIMITED_POSITIONS,
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
        # Engines built for transformers 4 read these two.
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


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the target's rotary base, and its scaling if a Llama layer supports it."""
    given = getattr(config, "rope_parameters", None) or {}
    given = given.get("full_attention", given)
    theta = given.get("rope_theta", 10000.0)
    if given.get("rope_type", "default") not in ROPE_SCALINGS:
        return {"rope_type": "default", "rope_theta": theta}
    return {key: value for key, value in given.items() if key != "partial_rotary_factor"} | {"rope_theta": theta}
