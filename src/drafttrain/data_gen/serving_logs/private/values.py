"""JSON without what is private: what a text does not tell, the key above it may."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from drafttrain.data_gen.serving_logs.private.named_secrets import is_named_secret

LONGEST_UNDER_KEY = 256
"""Characters of a value that is read together with its key; longer ones are texts."""
HIDDEN = "[key]"
SHORTEST = 6
"""Characters of a secret that one token spells."""


def without_private(value: Any, redact: Callable[[str], str], *, max_depth: int) -> Any:
    """Return a value with every text, key and number in it redacted, texts that are JSON themselves (arguments of tools) included.

    Args:
        max_depth: Levels that are looked into; what lies deeper is left out.
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
    """Return a value, or each of a list, as its key lets it be read."""
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
    """Return whether tokens that were likely, one after the other, spell what must not be kept.

    Args:
        alternatives: By position, the tokens by their rank, the answered one first.
    """
    ranks = max(map(len, alternatives), default=0)
    # Where a position has fewer, the answered token stands, as in the text that was nearly written.
    texts = ["".join(row[rank if rank < len(row) else 0] for row in alternatives if row) for rank in range(ranks)]
    longer = {token for row in alternatives for token in row if len(token) >= SHORTEST}
    return any(redact(words) != words for words in (*texts, *longer))
