"""The drafter's own language model, for proposers that let it read what its own proposer would not."""

from __future__ import annotations

from typing import Any

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters import Drafter


def language_model_of(drafter: Drafter | None, proposer: str) -> Any:
    """Return the Hugging Face causal LM of a drafter, which reads and writes the target's tokens.

    Raises:
        CheckpointError: It reads states of the target, or has its own tokenizer.
    """
    assert drafter is not None, "an evaluation has a drafter"
    if not drafter.writes_text or drafter.vocabulary is not None:
        has = "its own tokenizer" if drafter.writes_text else "none"
        raise CheckpointError(
            f"{proposer}: needs a drafter with a language model that reads the target's tokens (drafter.kind causal_lm), and "
            f"drafter.kind {drafter.kind} has {has}"
        )
    return drafter.language_model
