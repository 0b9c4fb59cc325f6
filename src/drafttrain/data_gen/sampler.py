"""Which records an optimizer step reads: their order, and which process reads which of them.

Position n of the stream of records is a pure function of (seed, n). The records of a step are dealt in rounds of one record for each
process: the longest first, from the first process to the last, and in the next round back, so that all processes read about as many
tokens. A micro-batch is some successive rounds, so that records that are read at the same time have about the same length.

P = records of a window, S = sources, L = possible lengths of a window
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

from drafttrain.core.random import stream_seed

Array = np.ndarray[tuple[int], np.dtype[np.int64]]

LONGEST_WINDOW = 2**15
"""Records of a window at most. Weights of up to four digits repeat within it exactly."""


class Sampler:
    """Mixes sources in exact shares and shuffles each, epoch by epoch.

    The stream is divided into windows: of the length after which the weights repeat, or, if that is longer than
    `LONGEST_WINDOW`, of the length that they divide most evenly. At every place of a window, the number of records read from a
    source is less than one record away from its share. Remainders are carried to later windows, so that a source of any weight
    is read in the long run.

    Args:
        sizes: Records of each source.
        weights: Relative shares, read as decimals: 0.1 is a tenth.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self._weights_S = _whole(weights)
        self._length = _window_length(self._weights_S)
        self._window = lru_cache(maxsize=4)(self._arranged)
        self._order = lru_cache(maxsize=2 * len(self.sizes))(self._shuffled)

    def at(self, position: int) -> tuple[int, int]:
        """Return (source, record) of a position."""
        source, count = self.turn(position)
        epoch, index = divmod(count, self.sizes[source])
        return source, int(self._order(source, epoch)[index])

    def turn(self, position: int) -> tuple[int, int]:
        """Return (source, how many records of this source are read before this position)."""
        number, place = divmod(position, self._length)
        before_S, source_P, nth_P = self._window(number)
        source = int(source_P[place])
        return source, before_S[source] + int(nth_P[place])

    def _arranged(self, number: int) -> tuple[list[int], Array, Array]:
        """Return the number of records of each source before a window, and the window's order."""
        before_S, after_S = (_apportioned(n * self._length, self._weights_S) for n in (number, number + 1))
        return before_S, *_interleaved(tuple(b - a for a, b in zip(before_S, after_S, strict=True)))

    def _shuffled(self, source: int, epoch: int) -> Array:
        generator = np.random.Generator(np.random.PCG64(stream_seed(self.seed, "order", source, epoch)))
        return generator.permutation(self.sizes[source])


def num_micro_batches(batch_size: int, *, records_per_device: int | None, world_size: int) -> int:
    """Return the number of micro-batches of an optimizer step, equal on all processes: the fewest that hold its records."""
    return 1 if records_per_device is None else -(-batch_size // (world_size * records_per_device))


def own_shares(
    lengths: Sequence[int], *, records_per_device: int | None, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Return the numbers of the records that one process reads in each micro-batch of a step; some may have none.

    Args:
        lengths: Tokens of each record of the step.
        records_per_device: The most records of one micro-batch on one process; None: all its records form one micro-batch.
    """
    rounds = -(-len(lengths) // world_size)
    count = num_micro_batches(len(lengths), records_per_device=records_per_device, world_size=world_size)
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    shares: list[list[int]] = [[] for _ in range(count)]
    for number in range(rounds):
        place = rank if number % 2 == 0 else world_size - 1 - rank
        dealt = longest_first[number * world_size : (number + 1) * world_size]
        # Rounds are spread evenly over the micro-batches; within one, records keep the order of the step.
        shares[number * count // rounds] += dealt[place : place + 1]
    return [sorted(share) for share in shares]


def _whole(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers of the same ratio."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return [weight // gcd(*whole) for weight in whole]


def _window_length(weights_S: Sequence[int]) -> int:
    """Return the window length at which the shares of all sources are integers, or nearest to integers."""
    total = sum(weights_S)
    if total <= LONGEST_WINDOW:
        return total
    length_L = np.arange(LONGEST_WINDOW // 2, LONGEST_WINDOW + 1)
    share_LS = length_L[:, None] * np.array([weight / total for weight in weights_S])
    return int(length_L[np.abs(share_LS - share_LS.round()).max(axis=1).argmin()])


def _apportioned(total: int, weights_S: Sequence[int]) -> list[int]:
    """Divide a total by weights into integers, none of which shrinks when the total grows.

    Each source takes its rounded share of what the sources before it left, the heaviest first, which keeps errors small.
    """
    shares_S = [0] * len(weights_S)
    left, rest = total, sum(weights_S)
    for source in sorted(range(len(weights_S)), key=lambda i: -weights_S[i]):
        if rest:
            shares_S[source] = (2 * weights_S[source] * left + rest) // (2 * rest)
        left, rest = left - shares_S[source], rest - weights_S[source]
    return shares_S


@lru_cache(maxsize=16)
def _interleaved(counts_S: tuple[int, ...]) -> tuple[Array, Array]:
    """Return, for every place of a window, the source and the number of its record there, from 0.

    A record may be read once its source is `slack` behind its share, and must be read before it is more than 1 - slack behind.
    Among the records that may be read, the one with the earliest deadline is next. No source is ever more than 1 - slack away
    from its share, which is optimal.

    Source: Tijdeman 1980, The chairman assignment problem, Discrete Mathematics 32.
    """
    length = sum(counts_S)
    used = [source for source, count in enumerate(counts_S) if count]
    slack = Fraction(1, 2 * max(2, len(used)) - 2)
    read_S = [0] * len(counts_S)
    source_P, nth_P = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)

    def window(source: int) -> tuple[int, int, int]:
        """Return the last allowed place of the next record, its source, and its first allowed place, from 1."""
        nth, count = read_S[source], counts_S[source]
        first = -((nth + slack) * length // -count)
        return int((nth + 1 - slack) * length // count) + 1, source, int(first)

    waiting = [window(source) for source in used]
    for place in range(1, length + 1):
        _, source, _ = chosen = min(one for one in waiting if one[2] <= place)
        waiting.remove(chosen)
        source_P[place - 1], nth_P[place - 1] = source, read_S[source]
        read_S[source] += 1
        if read_S[source] < counts_S[source]:
            waiting.append(window(source))
    return source_P, nth_P
