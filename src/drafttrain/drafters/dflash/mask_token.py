"""Which token stands in the mask slots of a block: an id of the target's vocabulary that no text has."""

from __future__ import annotations

import re
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.target_model import Target

SPARE = re.compile(r"reserved|unused|placeholder|extra_id|dummy|mask|\bpad\d", re.IGNORECASE)
"""In the name of a special token that texts do not have."""


def mask_token_of(target: Target, given: int | None) -> int:
    """Return the given id, or one that no text has: a row of padding after the tokenizer's last id, its mask token, a reserved token.

    Raises:
        CheckpointError: The id is outside of the target's vocabulary, or none is free.
    """
    meaningful = _meaningful(target)
    if given is not None:
        if given >= target.vocab_size:
            raise CheckpointError(
                f"drafter.mask_token_id must be in 0..{target.vocab_size - 1} for this target, got {given}"
            )
        if given in meaningful:
            say(f"drafter.mask_token_id: {given} ends texts or pads them: its embedding has a meaning already")
        return given
    if target.num_tokens < target.vocab_size:
        return target.num_tokens
    found = [one for one in _spare_tokens(target.tokenizer) if one < target.vocab_size and one not in meaningful]
    if not found:
        raise CheckpointError(
            f"drafter.mask_token_id: no unused id was found among the {target.vocab_size} of {target.name}: "
            "give one that its texts do not have"
        )
    return found[0]


def _meaningful(target: Target) -> set[int]:
    """Return the ids that end texts, begin them or pad them."""
    tokenizer = target.tokenizer
    named = [getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad", "bos")]
    return {*target.eos_token_ids, *(one for one in named if one is not None)}


def _spare_tokens(tokenizer: Any) -> list[int]:
    """Return the tokenizer's mask token, then its special tokens with the name of a spare one."""
    own = getattr(tokenizer, "mask_token_id", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = sorted(number for number, token in added.items() if token.special and SPARE.search(str(token.content)))
    return ([] if own is None else [own]) + named
