"""Finds exchanges that repeat an earlier one, word for word or nearly.

Nearly: MinHash signatures of the words' 3-grams, in bands (Broder 1997, On the resemblance and containment of documents). A
library would be larger than these few lines.

H = hashes of a signature, G = n-grams
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused

NUM_HASHES = 64
BANDS = 8
NGRAM = 3
PROMPT_TAIL = 2000
"""Characters of the last turn that are compared: a long system prompt would make all exchanges near duplicates."""
_PRIME = np.uint64(2**31 - 1)
_FACTORS_H2 = np.random.Generator(np.random.PCG64(20)).integers(1, 2**31 - 1, size=(NUM_HASHES, 2), dtype=np.uint64)


@dataclass(frozen=True)
class Mark:
    """What is remembered of an exchange."""

    exact: str
    near: str
    """The signature in hexadecimal digits; empty: too few words to compare, or near duplicates are not looked for."""


class Duplicates:
    """Remembers the newest exchanges.

    Args:
        similarity: Two exchanges that share this much of their n-grams are near duplicates; None: only equal ones are found.
        remembered: Exchanges that a new one is compared with.
    """

    def __init__(self, *, similarity: float | None, remembered: int) -> None:
        self._similarity = similarity
        self._remembered = remembered
        self._exact: OrderedDict[str, None] = OrderedDict()
        self._signatures: OrderedDict[int, np.ndarray[Any, Any]] = OrderedDict()
        self._bands: dict[tuple[int, bytes], int] = {}
        self._count = 0

    def mark(self, exchange: Exchange) -> Mark:
        """Return the mark of an exchange, to be remembered once it is used.

        Raises:
            Refused: It repeats an earlier exchange, or nearly.
        """
        question, answer = _texts(exchange)
        digest = hashlib.blake2b(f"{question}\0{answer}".encode("utf-8", "replace"), digest_size=16).hexdigest()
        if digest in self._exact:
            raise Refused("duplicate", "an earlier exchange has the same question and answer")
        if self._similarity is None or exchange.answer is None:
            return Mark(digest, "")
        last = exchange.prompt[-1]["content"] if isinstance(exchange.prompt, list) else exchange.prompt or ""
        signature_H = _signature(f"{last[-PROMPT_TAIL:]} {exchange.answer}")
        if signature_H is None:
            return Mark(digest, "")
        for other in {self._bands[key] for key in _keys(signature_H) if key in self._bands}:
            if float((self._signatures[other] == signature_H).mean()) >= self._similarity:
                raise Refused("near_duplicate", "an earlier exchange has nearly the same question and answer")
        return Mark(digest, signature_H.tobytes().hex())

    def remember(self, mark: Mark) -> None:
        """Compare later exchanges with this one; the oldest is forgotten when there are too many."""
        self._exact[mark.exact] = None
        if len(self._exact) > self._remembered:
            self._exact.popitem(last=False)
        if not mark.near:
            return
        signature_H = np.frombuffer(bytes.fromhex(mark.near), dtype=np.uint32)
        self._signatures[self._count] = signature_H
        self._bands |= dict.fromkeys(_keys(signature_H), self._count)
        self._count += 1
        if len(self._signatures) > self._remembered:
            number, old_H = self._signatures.popitem(last=False)
            for key in _keys(old_H):
                if self._bands.get(key) == number:
                    del self._bands[key]


def _keys(signature_H: np.ndarray[Any, Any]) -> list[tuple[int, bytes]]:
    """Return the bands of a signature: near duplicates almost surely share one."""
    return [(band, row.tobytes()) for band, row in enumerate(signature_H.reshape(BANDS, -1))]


def _texts(exchange: Exchange) -> tuple[str, str]:
    """Return question and answer as text, or as ids where there is no text."""
    question = exchange.prompt if exchange.prompt is not None else exchange.prompt_ids
    return str(question), exchange.answer if exchange.answer is not None else str(exchange.answer_ids)


def _signature(words: str) -> np.ndarray[Any, Any] | None:
    """Return the least hash of the n-grams under each of H functions; None: too few words to compare."""
    parts = words.split()
    if len(parts) < 2 * NGRAM:
        return None
    grams = {" ".join(parts[i : i + NGRAM]) for i in range(len(parts) - NGRAM + 1)}
    hashed = [
        int.from_bytes(hashlib.blake2b(g.encode("utf-8", "replace"), digest_size=4).digest(), "big") for g in grams
    ]
    hashes_G = np.array(hashed, dtype=np.uint64) % _PRIME
    least_H = np.full(NUM_HASHES, _PRIME, dtype=np.uint64)
    for start in range(0, len(hashes_G), 4096):
        piece_G = hashes_G[start : start + 4096]
        values_HG = (piece_G[None] * _FACTORS_H2[:, :1] + _FACTORS_H2[:, 1:]) % _PRIME
        least_H = np.minimum(least_H, values_HG.min(axis=1))
    signature: np.ndarray[Any, Any] = least_H.astype(np.uint32)
    return signature
