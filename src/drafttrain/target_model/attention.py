"""The attention implementation of a model: the requested one, or the fastest that it supports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.errors import CheckpointError


def drafter_attention(target_model: Any | None) -> str | None:
    """Return the attention of a drafter that is a language model; None: the fastest that it supports.

    If the target uses eager attention, so does its drafter. Other values are not inherited: the drafter may have another
    architecture, and is trained in another type.
    """
    eager = target_model is not None and target_model.config._attn_implementation == "eager"
    return "eager" if eager else None


def given_attention(model: Any) -> list[tuple[Any, str]]:
    """Return each configuration of the model and its modules, with the attention that it names."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    found = {id(config): config for config in configs if hasattr(config, "_attn_implementation")}
    return [(config, config._attn_implementation) for config in found.values()]


@contextmanager
def replaced_attention(given: Sequence[tuple[Any, str]], name: str) -> Iterator[None]:
    """Within this context these configurations name another attention; afterwards the given one."""
    try:
        for config, _ in given:
            config._attn_implementation = name
        yield
    finally:
        for config, before in given:
            config._attn_implementation = before


def refuse_attention(folder: Path, attention: str | None, *, trust_remote_code: bool) -> None:
    """Refuse an attention that the model of a folder does not support, or that needs a missing package.

    Raises:
        CheckpointError: Names the setting, and a value that works.
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
        # The folder has another problem, which the caller reports.
        return
    if model is not None:
        raise CheckpointError(
            f"{folder}: {type(model).__name__} does not support attention {attention!r} here: "
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
