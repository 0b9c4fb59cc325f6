"""Contamination: evaluation prompts that share a long run of tokens with the training text."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from drafttrain.core.files import write_json

FORMAT = 3
"""Of the file of contaminated prompts. 1 named prompts without an `id` by their line, also those that have a `question_id`; 2 compared
first questions only."""

_PRIME = np.uint64(0x100000001B3)


Key = TypeVar("Key", bound=Hashable)
"""Identifies a prompt."""


def contaminated(
    prompts: Mapping[Key, Sequence[int]], texts: Iterable[np.ndarray[Any, Any]], *, ngram: int
) -> list[Key]:
    """Return the keys of the contaminated prompts in order: they share `ngram` tokens in a row with one of the texts.

    Args:
        prompts: Tokens by key.
        texts: Arrays of tokens; an n-gram never spans two of them.
        ngram: 0 turns the check off.
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
        for place in np.flatnonzero(_are_in(hashes, wanted)).tolist():
            window = tuple(int(token) for token in text[place : place + ngram])
            found |= {id for id in owners[int(hashes[place])] if window in exact[id]}
    return [id for id in prompts if id in found]


def write_contamination(path: Path, found: Sequence[Key], *, num_prompts: int, ngram: int) -> None:
    """Write the keys of the contaminated prompts, (file of prompts, id) each."""
    write_json(path, {"format": FORMAT, "ngram": ngram, "prompts": num_prompts, "dropped": found})


def is_current(path: Path) -> bool:
    """Return whether the keys were written to `path`, with the ids that prompts have in this version."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("format") == FORMAT


def read_contamination(path: Path, *, prompts: str) -> list[str]:
    """Return the ids of the contaminated prompts of one file of prompts; none where nothing was written to `path`."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))["dropped"]
    return [id for name, id in found if name == prompts]


def _ngrams(tokens: Sequence[int], ngram: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1)}


def _are_in(values_N: np.ndarray[Any, Any], wanted_M: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return whether each value is in `wanted_M`, which is sorted; np.isin would sort the values of every text too."""
    if not len(wanted_M):
        return np.zeros(len(values_N), dtype=np.bool_)
    return wanted_M[np.searchsorted(wanted_M, values_N).clip(max=len(wanted_M) - 1)] == values_N


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
