"""The best static tree for a table of accuracies: which guesses of which heads become nodes.

K = heads, R = ranks
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Path = tuple[int, ...]
"""A node, by the ranks on its path: (0, 2) is the third guess of head 2 under the first guess of head 1."""

Table = Sequence[Sequence[float]]
"""accuracy_KR[k][i]: probability that guess i of head k + 1 is right."""


def non_increasing(accuracies_R: Sequence[float]) -> list[float]:
    """Return the nearest row that does not increase with rank: neighbours out of order get their mean.

    Otherwise the greedy construction would not be optimal: a better guess could hide behind a worse sibling.
    """
    pools: list[tuple[float, int]] = []
    for value in accuracies_R:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            before, size = pools.pop()
            total, count = total + before, count + size
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def best_paths(accuracy_KR: Table, num_nodes: int) -> list[Path]:
    """Return the nodes of the tree with the largest expected number of accepted tokens, best first.

    A node's value is the product of the accuracies on its path. Adding the best next sibling or first child greedily is
    optimal for non-increasing rows. So every prefix of the list is the best tree of its size, also after limits on depth
    or on children are applied.

    Args:
        accuracy_KR: Each head's row non-increasing in rank.

    Source: Cai et al. 2024, Medusa, arXiv 2401.10774, appendix on the construction of the tree.
    """
    assert all(list(row) == sorted(row, reverse=True) for row in accuracy_KR)
    found: list[Path] = []
    frontier: list[tuple[float, int, Path, float]] = []

    def add(parent_worth: float, path: Path) -> None:
        if len(path) > len(accuracy_KR) or path[-1] >= len(accuracy_KR[len(path) - 1]):
            return
        worth = parent_worth * accuracy_KR[len(path) - 1][path[-1]]
        if worth > 0:
            heapq.heappush(frontier, (-worth, len(path), path, parent_worth))

    add(1.0, (0,))
    while frontier and len(found) < num_nodes:
        negative, _, path, parent_worth = heapq.heappop(frontier)
        found.append(path)
        add(-negative, (*path, 0))
        add(parent_worth, (*path[:-1], path[-1] + 1))
    return found


def within(paths: Sequence[Path], *, nodes: int, depth: int, width: int) -> list[Path]:
    """Return the best `nodes` paths within a depth and a number of children per node."""
    return [path for path in paths if len(path) <= depth and max(path) < width][:nodes]
