"""Which attention of transformers a model runs with: the one that was asked for, or the quickest that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drafttrain.core.errors import CheckpointError


def drafter_attention(target_model: Any | None) -> str | None:
    """Return the attention of a drafter that is a language model; None: the quickest that the drafter has.

    Eager attention of the target is eager attention of its drafter too. Any other is not handed on: the drafter may be of another
    architecture, and is trained in another type than its target runs in.
    """
    eager = target_model is not None and target_model.config._attn_implementation == "eager"
    return "eager" if eager else None


def refuse_attention(folder: Path, attention: str | None, *, trust_remote_code: bool) -> None:
    """Refuse an attention that the model of a folder does not have, or for which something is not installed.

    Raises:
        CheckpointError: Naming our setting, and a value that works.
    """
    from transformers import AutoConfig

    if attention is None:
        return
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        if _built(config, attention, trust_remote_code=trust_remote_code) is not None:
            return
        model = _built(config, None, trust_remote_code=trust_remote_code)
    except Exception:
        # Something else is wrong with the folder.
        return
    if model is not None:
        raise CheckpointError(
            f"{folder}: {type(model).__name__} does not run with attention {attention!r} here: "
            f"set target.attention: {model.config._attn_implementation}"
        )


def _built(config: Any, attention: str | None, *, trust_remote_code: bool) -> Any | None:
    """Return the model without weights; None where it cannot be built with this attention."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (ImportError, ValueError):
        return None
