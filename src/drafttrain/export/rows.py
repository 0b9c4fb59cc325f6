"""A plain LM whose vocabulary is padded differently from its target's: rows are added or removed, because engines need equal sizes.

V = the target's rows, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import text_config


def with_rows_of(files: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
    """Return the files of a causal LM with as many rows as the target's vocabulary; other kinds have that many already.

    Both models have rows for all tokens of their common tokenizer, so only padding rows differ, and no text holds those. An added row
    is 0, so its logit is 0, far below that of a likely token.
    """
    rows, own = text_config(target_config).get("vocab_size"), files.config.get("vocab_size")
    if files.kind != "causal_lm" or not isinstance(rows, int) or not isinstance(own, int) or rows == own:
        return files
    tensors = {
        name: _fitted(tensor, rows) if tensor.dim() >= 1 and _is_by_token(name) and tensor.shape[0] == own else tensor
        for name, tensor in files.tensors.items()
    }
    note = f"vocab_size is {own}, the target's {rows}: rows of padding are {'added' if rows > own else 'removed'}"
    return replace(files, config={**files.config, "vocab_size": rows}, tensors=tensors, notes=(*files.notes, note))


def _is_by_token(name: str) -> bool:
    """Return whether a tensor has a row by token: embedding, head, or the head's bias."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return module in ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out", "output")


def _fitted(tensor: Tensor, rows: int) -> Tensor:
    if rows <= tensor.shape[0]:
        return tensor[:rows].clone()
    added = torch.zeros(rows - tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype)
    return torch.cat([tensor, added])
