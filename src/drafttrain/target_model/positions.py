"""The number of positions of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from drafttrain.core.errors import CheckpointError

POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings")
UNLIMITED_POSITIONS = 1 << 20
"""Positions of a drafter whose target names no limit: rotary angles have none."""


def position_limit(model: Any) -> int | None:
    """Return the number of learned position embeddings; None: positions are computed (rotary, ALiBi)."""
    learnt = any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_EMBEDDINGS
        for name, module in model.named_modules()
    )
    return int(model.config.get_text_config().max_position_embeddings) if learnt else None


def check_positions(model: Any, last: int, *, limit: int | None, name: str) -> None:
    """Check that a text's last position has an embedding.

    Args:
        limit: `position_limit` of the model.

    Raises:
        CheckpointError: It has none.
    """
    if limit is not None and last >= limit:
        raise CheckpointError(
            f"{name}: token {last + 1} is beyond the {limit} position embeddings of {type(model).__name__}: use shorter prompts or "
            "fewer new tokens"
        )


def max_positions(config: Any) -> int | None:
    """Return the positions in a model's configuration. Engines serve no text beyond the target's or the drafter's."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
