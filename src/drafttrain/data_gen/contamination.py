"""Which prompts of an evaluation share a long run of tokens with the training text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

_PRIME = np.uint64(0x100000001B3)


Key = TypeVar("Key", bound=Hashable)
"""What tells prompts apart."""


def contaminated(
    prompts: Mapping[Key, Sequence[int]], texts: Iterable[np.ndarray[Any, Any]], *, ngram: int
) -> list[Key]:
    """Return the keys of prompts that share `ngram` tokens in a row with one of the texts, in order.

    Args:
        prompts: Tokens by key.
        texts: Arrays of tokens; no n-gram is looked for across two of them.
    """
    if ngram == 0:
        return []
    owners: dict[int, list[Key]] = {}
    for id, tokens in prompts.items():
        for value in _hashes(np.asarray(tokens), ngram).tolist():
            owners.setdefault(value, []).append(id)
    wanted = np.array(sorted(owners), dtype=np.uint64)
    exact = {id: _ngrams(tokens, ngram) for id, tokens in prompts.items()}
    found: set[Key] = set()
    for text in texts:
        hashes = _hashes(np.asarray(text), ngram)
        for place in np.flatnonzero(np.isin(hashes, wanted)).tolist():
            window = tuple(int(token) for token in text[place : place + ngram])
            found |= {id for id in owners[int(hashes[place])] if window in exact[id]}
    return [id for id in prompts if id in found]


def _ngrams(tokens: Sequence[int], ngram: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1)}


def _hashes(tokens: np.ndarray[Any, Any], ngram: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a 64-bit hash of every n-gram; a match is checked token by token."""
    count = len(tokens) - ngram + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    values = tokens.astype(np.uint64)
    hashes = np.full(count, 0xCBF29CE484222325, dtype=np.uint64)
    for offset in range(ngram):
        hashes = (hashes ^ values[offset : offset + count]) * _PRIME
        hashes ^= hashes >> np.uint64(29)
    return hashes
