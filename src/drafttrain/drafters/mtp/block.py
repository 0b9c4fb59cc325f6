"""The decoder layer of an MTP drafter: of the target's own kind, dense with plain attention, or with latent attention.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.eagle.layer import EagleLayer, Norm
from drafttrain.drafters.eagle.layer_config import ROPE_SCALINGS, layer_config, llama_config
from drafttrain.drafters.mtp.latent import LatentLayer, has_latent_attention, latent_fields, latent_shapes
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks


class PlainLayer(EagleLayer):
    """A Llama, Qwen2 or Qwen3 layer: the norm of its input is part of it."""

    def __init__(self, config: Any, *, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__(config, input_size=config.hidden_size, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)


Block = PlainLayer | LatentLayer


def block_config(target: Target) -> dict[str, Any]:
    """Return the sizes of the layer, which are those of the target's blocks.

    Raises:
        CheckpointError: The target's blocks are of a kind that is not supported.
    """
    config = target.model.config.get_text_config()
    if reason := _unsupported(config):
        raise CheckpointError(f"drafter.kind mtp: {target.name}: {reason}")
    whole = layer_config(target, num_heads=None, num_kv_heads=None, intermediate_size=None) | {"model_type": "mtp"}
    # No engine reads this file, so the older forms of `rope_parameters` are not needed.
    fields = {name: value for name, value in whole.items() if name not in ("rope_theta", "rope_scaling")}
    attention = getattr(blocks(target.model)[-1], "self_attn", None)
    if has_latent_attention(config):
        return fields | {"qkv_bias": False, "qk_norm": False, "latent": latent_fields(target.model)}
    return fields | {
        "qkv_bias": getattr(getattr(attention, "q_proj", None), "bias", None) is not None,
        "qk_norm": getattr(attention, "q_norm", None) is not None,
    }


def new_block(fields: Mapping[str, Any], target: Target) -> Block:
    """Return the layer with random weights.

    Args:
        fields: What `block_config` returned.
    """
    if has_latent_attention(target.model.config.get_text_config()):
        return LatentLayer(target.model)
    return PlainLayer(llama_config(dict(fields)), qkv_bias=fields["qkv_bias"], qk_norm=fields["qk_norm"])


def block_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the layer by name.

    Args:
        fields: What `block_config` returned.
    """
    if latent := fields.get("latent"):
        return latent_shapes(fields, latent)
    width, inner, size = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    rows = {"q": fields["num_attention_heads"] * size} | dict.fromkeys("kv", fields["num_key_value_heads"] * size)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj.weight": (count, width) for name, count in rows.items()},
        "self_attn.o_proj.weight": (width, rows["q"]),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if fields["qkv_bias"]:
        shapes |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
    if fields["qk_norm"]:
        shapes |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
    return shapes


def _unsupported(config: Any) -> str | None:
    """Return what in a target's configuration this layer cannot compute; None: nothing."""
    if has_latent_attention(config):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    facts = {
        "hidden_act": (getattr(config, "hidden_act", None), ("silu",)),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), ("default", *ROPE_SCALINGS)),
        "rope_parameters.partial_rotary_factor": (rope.get("partial_rotary_factor", 1), (1, 1.0, None)),
        "sliding_window": (getattr(config, "sliding_window", None), (None,)),
    }
    wrong = [
        f"config.json: {name} is {value}, must be {' or '.join(map(str, dict.fromkeys(allowed)))}"
        for name, (value, allowed) in facts.items()
        if value not in allowed
    ]
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        wrong.append(
            f"model_type {config.model_type}: its layers have experts, which are supported with latent attention only"
        )
    return "; ".join(wrong) or None
