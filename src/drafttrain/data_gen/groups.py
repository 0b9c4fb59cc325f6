"""Which texts a model reads together, and how many tokens at once: the one owner of both."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS_AT_ONCE = 16_384
"""Tokens of one call of a model that keeps no cache of them, padding included: 8 texts of 2,048 tokens."""
TOKENS_STORED = 4096
"""Tokens of one call, padding included, whose outputs are stored. Another number moves stored logits by rounding."""
TOKENS_STORED_ON_CPU = 1024
"""The same on a CPU: activations of fewer tokens stay in its caches, which is a quarter faster."""


def groups(lengths: Sequence[int], *, tokens: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Return groups of text numbers, longest texts first: a text too long for memory fails at once, not after an hour.

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


def groups_in_order(lengths: Sequence[int], *, tokens: int) -> list[list[int]]:
    """Return groups of consecutive text numbers, so that outputs can be stored in the order of the texts.

    Args:
        lengths: Tokens of each text.
        tokens: Tokens of a group's texts together, at most. A longer text is a group by itself.
    """
    found: list[list[int]] = []
    held = 0
    for number, length in enumerate(lengths):
        if not found or held + length > tokens:
            found.append([])
            held = 0
        found[-1].append(number)
        held += length
    return found
