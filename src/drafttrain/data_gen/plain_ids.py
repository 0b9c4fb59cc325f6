"""The ids of text, and of text that continues another: some tokenizers (Llama) put a space before the start of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.data_gen.bad_item import foreign

FRONTS = ("\n", ".", "a")
"""Texts before which a continuation is encoded, to get its ids without that space; the first that no token joins with is used."""


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of text, without special tokens.

    Raises:
        BadItem: The tokenizer fails.
    """
    with foreign("the tokenizer fails on this text"):
        return list(tokenizer(text, add_special_tokens=False).input_ids)


def begins(tokens: Sequence[int], start: Sequence[int]) -> bool:
    """Return whether tokens begin with others."""
    return list(tokens[: len(start)]) == list(start)


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of text that continues another, without special tokens.

    Raises:
        BadItem: The tokenizer fails.
    """
    front = front_of(tokenizer, text)
    return plain_ids(tokenizer, front + text)[len(plain_ids(tokenizer, front)) :]


def front_of(tokenizer: Any, text: str) -> str:
    """Return the text to put before a continuation when it is encoded; empty if the tokenizer adds no space.

    Raises:
        BadItem: The tokenizer fails.
    """
    if _behind(tokenizer, "\n", "a") == plain_ids(tokenizer, "a"):
        return ""
    return next((front for front in FRONTS if _behind(tokenizer, front, text) is not None), "")


def _behind(tokenizer: Any, front: str, text: str) -> list[int] | None:
    """Return the ids of text after another; None: one token holds parts of both."""
    before, whole = plain_ids(tokenizer, front), plain_ids(tokenizer, front + text)
    return whole[len(before) :] if begins(whole, before) else None
