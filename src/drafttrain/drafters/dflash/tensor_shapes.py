"""The tensors of a block drafter's checkpoint, under z-lab's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def block_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the block's tensors; with a head of the drafter's own, also those of the head.

    Raises:
        KeyError: A field is missing.
    """
    width, rows = config["hidden_size"], config.get("draft_vocab_size")
    taps = len(config["dflash_config"]["target_layer_ids"])
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, taps * width),
        "hidden_norm.weight": (width,),
        "norm.weight": (width,),
    }
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{number}.{name}.weight": shape for name, shape in _layer_shapes(config).items()}
    if rows is not None:
        shapes["lm_head.weight"] = (rows, width)
        if rows != config["vocab_size"]:
            shapes |= {"d2t": (rows,), "t2d": (config["vocab_size"],)}
    return shapes


def _layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
