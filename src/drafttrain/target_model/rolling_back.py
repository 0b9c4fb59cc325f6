"""Which layers of a model have a state that can be rolled back."""

from __future__ import annotations

from typing import Any

from drafttrain.core.errors import CheckpointError

FULL_ATTENTION = ("full_attention", "attention")
SLIDING_ATTENTION = ("sliding_attention", "chunked_attention", "local_attention")


def window_of(config: Any, *, name: str) -> int | None:
    """Return the sliding window in tokens; None: every layer attends to everything.

    Raises:
        CheckpointError: A layer has a state that cannot be rolled back.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - {*FULL_ATTENTION, *SLIDING_ATTENTION})
    if unknown:
        raise CheckpointError(
            f"{name}: layers of kind {', '.join(unknown)} have a state that cannot be rolled back. "
            f"Supported layers: {', '.join((*FULL_ATTENTION, *SLIDING_ATTENTION))}"
        )
    sliding = bool(kinds & set(SLIDING_ATTENTION)) if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return int(window) if sliding and window else None


def refuse_states_that_cannot_roll_back(model: Any, *, name: str) -> None:
    """Refuse a model with a recurrent state.

    Raises:
        CheckpointError: It has one.
    """
    if getattr(model, "_is_stateful", False):
        raise CheckpointError(f"{name}: {type(model).__name__} has a recurrent state, which cannot be rolled back")
