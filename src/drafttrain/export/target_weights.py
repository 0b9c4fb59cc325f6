"""Single tensors of a target's files, found by the names that architectures give them, and how it reads its embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.tensors import TensorFiles
from drafttrain.export.layout import text_config

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def embedding_of(folder: Path) -> Tensor | None:
    """Return the token embedding; None if it has no known name."""
    return _one(folder, EMBEDDINGS)


def head_of(folder: Path) -> Tensor | None:
    """Return the output matrix; None if it is tied to the embedding or has no known name."""
    return _one(folder, HEADS)


def _one(folder: Path, endings: Sequence[str]) -> Tensor | None:
    files = TensorFiles(folder)
    name = next((name for name in sorted(files.names()) if name.endswith(tuple(endings))), None)
    return None if name is None else files.read(name)


def scales_embedding(target_config: Mapping[str, Any]) -> bool:
    """Return whether the target's embedding layer does more than read rows: Gemma's multiplies them.

    Args:
        target_config: config.json of the target. Models that transformers does not know count as plain.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = dict(text_config(target_config))
    if (kind := fields.pop("model_type", None)) not in CONFIG_MAPPING:
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    return type(model.get_input_embeddings()).forward is not nn.Embedding.forward
