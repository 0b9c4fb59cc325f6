"""Single tensors of a target's files, found by the names that architectures give them, without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from drafttrain.core.tensors import TensorFiles

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
