"""Texts that are read together: of like length, and never more of them than memory has room for."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS_AT_ONCE = 16_384
"""Tokens of one call of a model that keeps nothing of them, padding included: 8 texts of 2,048 tokens."""


def groups(lengths: Sequence[int], *, tokens: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Return groups of text numbers, longest texts first: what memory has no room for fails at once, not after an hour.

    Args:
        lengths: Tokens of each text.
        tokens: A group's number of texts times its longest length, at most. A longer text is a group by itself.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    found: list[list[int]] = []
    while order:
        count = max(1, tokens // max(1, lengths[order[0]]))
        found.append(order[:count])
        order = order[count:]
    return found
