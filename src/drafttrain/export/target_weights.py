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
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    fields = dict(text_config(target_config))
    # Without its head: language models inside multimodal ones may have no class with one.
    if (kind := fields.pop("model_type", None)) not in MODEL_MAPPING_NAMES:
        return False
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    return type(model.get_input_embeddings()).forward is not nn.Embedding.forward
