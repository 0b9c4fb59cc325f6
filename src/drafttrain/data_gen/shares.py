"""Which process reads which records of an optimizer step, in which micro-batch: balanced by length, so that no process waits long.

A round is one record for each process. The longest records are dealt first, from the first process to the last, and in the next
round back (a snake), so that all have about as many tokens; a micro-batch is some rounds in a row, so that records that are
read at the same time have about the same length.
"""

from __future__ import annotations

from collections.abc import Sequence


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
