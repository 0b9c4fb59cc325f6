"""The text of each token of a row, as far as a token has one: characters may span tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoded from a part of a character's bytes."""
LONGEST = 8
"""Tokens that one character can span; more are bytes that are no character."""


def token_texts(
    tokenizer: Any, tokens: Sequence[int], mask: Sequence[bool]
) -> Iterator[tuple[str, int, Sequence[int]]]:
    """Yield (text, place of the first token, ids): one token each, or several that share a character and a label flag.

    The texts joined are the text of the row, up to characters that a mask cuts.
    """
    # Some tokenizers drop the space before the first token of a text, so each is decoded behind the piece before it.
    before: Sequence[int] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        piece = tokens[start:end]
        text = _text(tokenizer, [*before, *piece])[len(_text(tokenizer, before)) :]
        goes_on = end < len(tokens) and mask[end] == mask[start] and len(piece) < LONGEST
        if text.endswith(INCOMPLETE) and goes_on:
            continue
        yield text, start, piece
        before, start = piece, end


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
