"""How many positions a model has."""

from __future__ import annotations

from typing import Any

from torch import nn

POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings")
UNLIMITED_POSITIONS = 1 << 20
"""Positions that a drafter has whose target names no end of its own: rotary angles know none."""


def position_limit(model: Any) -> int | None:
    """Return how many positions a model has learnt embeddings for; None where positions are computed (rotary, ALiBi)."""
    learnt = any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_EMBEDDINGS
        for name, module in model.named_modules()
    )
    return int(model.config.get_text_config().max_position_embeddings) if learnt else None


def max_positions(config: Any) -> int | None:
    """Return the positions that a target's configuration names: engines serve no text beyond them, nor beyond the drafter's own."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
