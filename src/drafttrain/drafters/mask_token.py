"""Which token stands for text that a drafter must not read: an id that no text has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.target_model import Target

SPARE = re.compile(r"reserved|unused|placeholder|extra_id|dummy|mask|\bpad\d", re.IGNORECASE)
"""In the name of a special token that texts do not have."""


def mask_token_of(target: Target, given: int | None) -> int:
    """Return the given id, or one of the target's vocabulary that no text has.

    Raises:
        CheckpointError: The id is outside of the vocabulary, or none is free.
    """
    return unused_token(
        target.tokenizer,
        given,
        num_rows=target.vocab_size,
        num_tokens=target.num_tokens,
        ends=target.eos_token_ids,
        of=target.name,
    )


def unused_token(
    tokenizer: Any, given: int | None, *, num_rows: int, num_tokens: int, ends: Iterable[int], of: str
) -> int:
    """Return the given id, or one that no text has: a row of padding after the tokenizer's last id, its mask token, a reserved token.

    Args:
        num_rows: Rows of the embedding that the token is read from.
        num_tokens: Ids that the tokenizer can produce.
        ends: The tokens that end a text.
        of: What the embedding is part of, for the error.

    Raises:
        CheckpointError: The id has no row, or none is free.
    """
    named = [getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad", "bos")]
    meaningful = {*ends, *(one for one in named if one is not None)}
    if given is not None:
        if given >= num_rows:
            raise CheckpointError(f"drafter.mask_token_id must be in 0..{num_rows - 1} for {of}, got {given}")
        if given in meaningful:
            say(f"drafter.mask_token_id: {given} ends texts or pads them: its embedding has a meaning already")
        return given
    if num_tokens < num_rows:
        return num_tokens
    found = [one for one in _spare_tokens(tokenizer) if one < num_rows and one not in meaningful]
    if not found:
        raise CheckpointError(
            f"drafter.mask_token_id: no unused id was found among the {num_rows} of {of}: give one that its texts do not have"
        )
    return found[0]


def _spare_tokens(tokenizer: Any) -> list[int]:
    """Return the tokenizer's mask token, then its special tokens with the name of a spare one."""
    own = getattr(tokenizer, "mask_token_id", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = sorted(number for number, token in added.items() if token.special and SPARE.search(str(token.content)))
    return ([] if own is None else [own]) + named
