"""The one place that owns the order: position n of the stream of records is a pure function of (seed, n)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

from drafttrain.core.random import stream_seed


class Sampler:
    """Mixes sources in exact shares and shuffles each, epoch by epoch.

    Any window of the stream holds each source's share within one record, and a whole period holds it exactly.

    Args:
        sizes: Records of each source.
        weights: Relative shares.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self._pattern, self._before = _pattern(weights)
        self._order = lru_cache(maxsize=2 * len(self.sizes))(self._shuffled)

    def at(self, position: int) -> tuple[int, int]:
        """Return (source, record) of a position."""
        period, place = divmod(position, len(self._pattern))
        source = int(self._pattern[place])
        taken = period * int(self._before[-1, source]) + int(self._before[place, source])
        epoch, index = divmod(taken, self.sizes[source])
        return source, int(self._order(source, epoch)[index])

    def _shuffled(self, source: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        generator = np.random.Generator(np.random.PCG64(stream_seed(self.seed, "order", source, epoch)))
        return generator.permutation(self.sizes[source])


def _pattern(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Return one period of sources, and how often each came before every place of it."""
    # Relative to the smallest, so that none is rounded away.
    smallest = Fraction(min(weight for weight in weights if weight > 0))
    shares = [(Fraction(weight) / smallest).limit_denominator(1000) for weight in weights]
    scale = lcm(*(share.denominator for share in shares))
    counts = [int(share * scale) for share in shares]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    length = sum(counts)
    given = np.zeros(len(counts), dtype=np.int64)
    pattern, before = [], [given.copy()]
    for place in range(1, length + 1):
        # The source that is furthest behind its share comes next.
        behind = [count * place - int(has) * length for count, has in zip(counts, given, strict=True)]
        source = max(range(len(counts)), key=lambda i: behind[i])
        pattern.append(source)
        given[source] += 1
        before.append(given.copy())
    return np.array(pattern), np.stack(before)
