"""Loads the causal LM of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drafttrain.core.console import say_once
from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import check_finite, check_number_types
from drafttrain.target_model.attention import refuse_attention
from drafttrain.target_model.folder_checks import check_causal_lm, in_one_line
from drafttrain.target_model.multimodal import auto_class_for, language_model_inside
from drafttrain.target_model.weight_shapes import refuse_wrong_shapes


def load_causal_lm(
    folder: Path, *, dtype: str = "float32", attention: str | None = "sdpa", trust_remote_code: bool = False
) -> Any:
    """Return the causal LM of a folder, of a multimodal model the one inside. Only safetensors are read.

    Raises:
        CheckpointError: It cannot be loaded, or does not support this attention.
    """
    whole = load_model(folder, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
    return language_model_inside(whole, folder)


def load_model(
    folder: Path, *, dtype: str = "float32", attention: str | None = "sdpa", trust_remote_code: bool = False
) -> Any:
    """Return the model of a folder: a causal LM, or a multimodal model around one. Only safetensors are read.

    Args:
        attention: Implementation of transformers; None: the fastest that the model and this machine support.

    Raises:
        CheckpointError: It cannot be loaded, or does not support this attention.
    """
    check_causal_lm(folder, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = auto_class_for(folder, trust_remote_code=trust_remote_code).from_pretrained(
            str(folder),
            dtype="auto" if dtype == "stored" else getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # broken files and third-party code raise anything
        refuse_attention(folder, attention, trust_remote_code=trust_remote_code)
        refuse_wrong_shapes(folder, trust_remote_code=trust_remote_code)
        raise CheckpointError(f"{folder}: cannot load a causal LM: {in_one_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing from its files: {', '.join(missing[:5])}")
    if unread := sorted(report["unexpected_keys"]):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        say_once(f"{folder}: ignored weights that the model does not have: {', '.join(unread[:3])}{more}")
    if getattr(model.config, "quantization_config", None) is None:
        check_finite(model.state_dict(), where=str(folder))
        check_number_types(folder)
    return model
