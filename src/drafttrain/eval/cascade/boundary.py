"""Where sentences and steps end: at the token that completes a mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SENTENCE = (".", "!", "?", "\n")
STEP = ("\n\n",)
TAIL = 8
"""Tokens that are decoded to look for a mark; a mark is shorter."""


class Marks:
    """Finds marks in tokens.

    Args:
        marks: Texts; a mark within a token counts, as in a token of a full stop and a quote.
    """

    def __init__(self, tokenizer: Any, marks: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._marks = tuple(marks)

    def completed_by_last(self, tokens: Sequence[int]) -> bool:
        """Return whether the last token completes a mark that begins in these tokens."""
        if not self._marks or not tokens:
            return False
        tail = list(tokens[-TAIL:])
        before, text = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (tail[:-1], tail))
        return any(mark in text[max(0, len(before) - len(mark) + 1) :] for mark in self._marks)
