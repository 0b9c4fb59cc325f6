"""JSON without private content: a key may show that its value is private even where the value alone does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from drafttrain.data_gen.serving_logs.private.named_secrets import is_named_secret

LONGEST_UNDER_KEY = 256
"""Longest value that is checked together with its key, in characters; longer values are texts."""
HIDDEN = "[key]"
SHORTEST = 6
"""Shortest token that is checked by itself, in characters."""


def without_private(value: Any, redact: Callable[[str], str], *, max_depth: int) -> Any:
    """Return a value with every text, key and number in it redacted, also inside texts that are JSON (arguments of tools).

    Args:
        max_depth: Levels that are read; deeper values are removed.
    """
    if isinstance(value, dict):
        return {
            redact(key): _under(key, part, redact, max_depth=max_depth - 1) for key, part in value.items() if max_depth
        }
    if isinstance(value, list):
        return [without_private(part, redact, max_depth=max_depth - 1) for part in value if max_depth]
    if isinstance(value, str):
        return _text(value, redact, max_depth=max_depth)
    if isinstance(value, int | float) and not isinstance(value, bool):
        words = str(value)
        return value if redact(words) == words else redact(words)
    return value


def _under(key: str, value: Any, redact: Callable[[str], str], *, max_depth: int) -> Any:
    """Return a value, or each value of a list, redacted together with its key."""
    if isinstance(value, list) and max_depth:
        return [_under(key.removesuffix("s"), part, redact, max_depth=max_depth - 1) for part in value]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        words = str(value)
        if is_named_secret(key, words):
            return HIDDEN
        if len(words) <= LONGEST_UNDER_KEY and words.strip():
            prefix = f"{key}: "
            found = redact(prefix + words)
            if found.startswith(prefix) and found != prefix + words:
                return found[len(prefix) :]
    return without_private(value, redact, max_depth=max_depth)


def _text(words: str, redact: Callable[[str], str], *, max_depth: int) -> str:
    if words.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(words)
        except (ValueError, RecursionError):
            return redact(words)
        kept = without_private(value, redact, max_depth=max_depth)
        if kept != value:
            return json.dumps(kept, ensure_ascii=False)
    return redact(words)


def spells_private(alternatives: Sequence[Sequence[str]], redact: Callable[[str], str]) -> bool:
    """Return whether alternative tokens, joined by rank, spell private content.

    Args:
        alternatives: By position, the tokens by rank, the answered one first.
    """
    ranks = max(map(len, alternatives), default=0)
    # A position with fewer tokens uses the answered one, as in the text that was nearly written.
    texts = ["".join(row[rank if rank < len(row) else 0] for row in alternatives if row) for rank in range(ranks)]
    longer = {token for row in alternatives for token in row if len(token) >= SHORTEST}
    return any(redact(words) != words for words in (*texts, *longer))
