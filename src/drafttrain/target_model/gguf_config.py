"""Configuration of a GGUF file: transformers' reading of it, completed by what that leaves out.

What the file sets and nothing here reads is refused: the model would silently compute something else.

F = frequencies of a rotation
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.folder_checks import in_one_line
from drafttrain.target_model.gguf_checks import INSTEAD, names_of, read_by_transformers
from drafttrain.target_model.gguf_header import GgufHeader

FREQUENCIES = "rope_freqs.weight"
"""The tensor by which llama.cpp divides the frequencies of Llama 3's scaled positions."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of every Llama 3 model but for its factor."""

GEMMA_27B = (46, 62)
"""Blocks of Gemma 2 and 3 with 27 billion weights."""

WHOLE, WINDOWED = "full_attention", "sliding_attention"
"""Types of layers, as transformers names them. Gemma 3 rotates each differently, and scales only the positions of the first."""

ROPE = {
    WHOLE: ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    WINDOWED: ("rope.freq_base_swa",),
}
HARMLESS = (
    *("vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.finetuned"),
    *(
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "attention.causal",
        "leading_dense_block_count",
    ),
)
"""Settings that follow from others, or whose wrong reading gives weights of another shape, which is refused."""


def gguf_config(header: GgufHeader) -> Any:
    """Return the configuration of a file.

    Raises:
        CheckpointError: transformers cannot read it, or it has settings that nothing here reads.
    """
    from transformers import AutoConfig

    path = header.path
    try:
        config: Any = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # whatever its reader raises for broken settings
        raise CheckpointError(f"{path}: transformers cannot read its settings: {in_one_line(error)}") from error
    _complete(config, header)
    if unread := [key for key in _own_settings(header) if not _is_read(key, header, config)]:
        raise CheckpointError(f"{path}: has settings that transformers does not read: {', '.join(unread)}: {INSTEAD}")
    return config


def llama3_factors(config: Any) -> Tensor:
    """Return the factor by which the scaling of llama3 divides each frequency, F."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled_F, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    steps_F = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    plain_F = 1.0 / config.rope_parameters["rope_theta"] ** steps_F
    return plain_F / scaled_F


def _complete(config: Any, header: GgufHeader) -> None:
    """Set the fields that transformers leaves at its defaults."""
    names = {tensor.name for tensor in header.tensors}
    if (size := header.own("attention.key_length")) is not None and hasattr(config, "head_dim"):
        config.head_dim = size
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = _gemma_scale(config)
    for field, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_gate.bias")):
        if hasattr(config, field):
            setattr(config, field, tensor in names)
    if rope := _rope_of(config, WHOLE):
        rope.update({"rope_theta": header.own("rope.freq_base") or rope["rope_theta"], **_scaling(header)})
    if windowed := _rope_of(config, WINDOWED):
        windowed["rope_theta"] = header.own("rope.freq_base_swa") or windowed["rope_theta"]
    if FREQUENCIES in names:
        _set_llama3(config, header)


def _rope_of(config: Any, layers: str) -> dict[str, Any]:
    """Return the rotation of a type of layers; a model with one rotation has it for those that see the whole text."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        return rope if layers == WHOLE else {}
    return rope.get(layers) or {}


def _gemma_scale(config: Any) -> int:
    """Return the square of the divisor of Gemma's attention scores, which the file does not have: llama.cpp knows it by size."""
    if config.num_hidden_layers in GEMMA_27B:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _scaling(header: GgufHeader) -> dict[str, Any]:
    """Return the fields of linear or YaRN scaling of positions."""
    kind, factor = header.own("rope.scaling.type"), header.own("rope.scaling.factor")
    if kind in (None, "none"):
        return {}
    if kind not in ("linear", "yarn") or factor is None:
        raise CheckpointError(
            f"{header.path}: {header.architecture}.rope.scaling.type is {kind!r} (factor {factor}), only linear and yarn with a "
            f"factor are read: {INSTEAD}"
        )
    fields = {"rope_type": kind, "factor": factor}
    if kind == "yarn" and (length := header.own("rope.scaling.original_context_length")) is not None:
        fields["original_max_position_embeddings"] = length
    return fields


def _set_llama3(config: Any, header: GgufHeader) -> None:
    """Set the scaling of Llama 3 whose frequencies are in the file.

    Raises:
        CheckpointError: They are not those of a Llama 3 model.
    """
    stored = next(tensor for tensor in header.tensors if tensor.name == FREQUENCIES)
    held_F = np.fromfile(header.path, "<f4", stored.num_values, offset=stored.start)
    factor = round(float(held_F.max()), 4) if stored.type == 0 else math.nan
    config.rope_parameters = {**config.rope_parameters, "rope_type": "llama3", "factor": factor, **LLAMA3}
    wanted_F = llama3_factors(config).numpy()
    if held_F.shape != wanted_F.shape or not np.allclose(held_F, wanted_F, rtol=1e-4):
        raise CheckpointError(
            f"{header.path}: {FREQUENCIES} is not the scaling of a Llama 3 model (factor {factor}, {LLAMA3}): {INSTEAD}"
        )


def _own_settings(header: GgufHeader) -> list[str]:
    prefix = f"{header.architecture}."
    return [key.removeprefix(prefix) for key in header.settings if key.startswith(prefix)]


def _is_read(key: str, header: GgufHeader, config: Any) -> bool:
    """Return whether a setting is in the configuration."""
    if key in HARMLESS or any(key in keys and _rope_of(config, layers) for layers, keys in ROPE.items()):
        return True
    read = read_by_transformers()
    if any(read.get(name, {}).get(key) is not None for name in (*names_of(header.architecture), config.model_type)):
        return True
    # A field that transformers leaves at its default is right if the file has the same value.
    return bool(getattr(config, key.rpartition(".")[2], None) == header.own(key))
