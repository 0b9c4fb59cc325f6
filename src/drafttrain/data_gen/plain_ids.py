"""The ids of text, and of text that continues another: some tokenizers (Llama) put a space before what begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.data_gen.bad_item import foreign

FRONTS = ("\n", ".", "a")
"""What a continuation is read behind, to see its ids without that space; one that no token of the text joins with."""


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of text, with nothing that the tokenizer adds.

    Raises:
        BadItem: The tokenizer fails.
    """
    with foreign("the tokenizer fails on this text"):
        return list(tokenizer(text, add_special_tokens=False).input_ids)


def begins(tokens: Sequence[int], start: Sequence[int]) -> bool:
    """Return whether tokens begin with others."""
    return list(tokens[: len(start)]) == list(start)


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of text that continues another, with nothing that the tokenizer adds.

    Raises:
        BadItem: The tokenizer fails.
    """
    front = front_of(tokenizer, text)
    return plain_ids(tokenizer, front + text)[len(plain_ids(tokenizer, front)) :]


def front_of(tokenizer: Any, text: str) -> str:
    """Return what to put in front of a continuation before it is encoded; nothing where the tokenizer adds no space.

    Raises:
        BadItem: The tokenizer fails.
    """
    if _behind(tokenizer, "\n", "a") == plain_ids(tokenizer, "a"):
        return ""
    return next((front for front in FRONTS if _behind(tokenizer, front, text) is not None), "")


def _behind(tokenizer: Any, front: str, text: str) -> list[int] | None:
    """Return the ids of text behind another; None: a token holds parts of both."""
    before, whole = plain_ids(tokenizer, front), plain_ids(tokenizer, front + text)
    return whole[len(before) :] if begins(whole, before) else None
