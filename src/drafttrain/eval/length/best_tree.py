"""The static tree with the most expected accepted tokens, by dynamic programming over sizes, levels and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.eval.length.static_tree import Shape


class BestTrees:
    """The best trees of all sizes and depths for given chances of acceptance. A chain is one of the candidates.

    Below a place that is reached, let B[l][m] be the most accepted tokens that m nodes in l levels can be expected to give. The child
    of rank k gets s of the m nodes, itself among them, and the later ranks the others:

        C[l][k][m] = max over s of p_k (1 + B[l - 1][s - 1]) + C[l][k + 1][m - s],    B[l][m] = C[l][1][m]

    Args:
        acceptance: p_k by rank: the chance that a place's k-th child is accepted, all before it having been rejected. It is the same
            for all places.
        nodes: Nodes of the largest tree.
        depth: Levels of the deepest tree.

    Source: Chen et al. 2024, Sequoia, arXiv 2402.12374, 3.1, where the number of children is bounded in the same way.
    """

    def __init__(self, acceptance: Sequence[float], *, nodes: int, depth: int) -> None:
        self.accepted_LM: list[list[float]] = [[0.0] * (nodes + 1)]
        """Expected accepted tokens by levels and nodes."""
        self._parts: list[list[list[int]]] = [[]]
        """By levels, rank and nodes, those of the child's part."""
        for _ in range(min(depth, nodes)):
            later, parts = [0.0] * (nodes + 1), []
            for chance in reversed(acceptance):
                later, part = _with_child(chance, self.accepted_LM[-1], later)
                parts.append(part)
            self.accepted_LM.append(later)
            self._parts.append(parts[::-1])

    def shape(self, *, nodes: int, levels: int) -> Shape:
        """Return the best tree."""
        shape: list[Shape] = []
        for part in self._parts[levels]:
            if nodes == 0 or part[nodes] == 0:
                break
            shape.append(self.shape(nodes=part[nodes] - 1, levels=levels - 1))
            nodes -= part[nodes]
        return tuple(shape)


def _with_child(chance: float, below_M: Sequence[float], later_M: Sequence[float]) -> tuple[list[float], list[int]]:
    """Return by number of nodes: the most accepted tokens with this child and later ones, and the nodes of its part."""
    best, parts = [0.0], [0]
    for nodes in range(1, len(below_M)):
        worth, part = max((chance * (1 + below_M[s - 1]) + later_M[nodes - s], s) for s in range(1, nodes + 1))
        best.append(worth)
        parts.append(part)
    return best, parts


@dataclass
class RankCounts:
    """How often the child of a rank was tested and accepted."""

    tested: list[int]
    accepted: list[int]

    @classmethod
    def of(cls, ranks: int) -> RankCounts:
        """Return no counts yet."""
        return cls([0] * ranks, [0] * ranks)

    def add(self, rejected: int, *, accepted: bool) -> None:
        """Count the test of a place's children: so many were rejected, then one accepted, or there were no more."""
        for rank in range(min(rejected + accepted, len(self.tested))):
            self.tested[rank] += 1
        if accepted and rejected < len(self.accepted):
            self.accepted[rejected] += 1

    def acceptance(self) -> list[float]:
        """Return p_k by rank.

        A rank's chance is the share of its tests, with one more test at half the chance of the rank before: ranks that were never
        tested get small chances instead of none.
        """
        chances, left, before = [], 1.0, 1.0
        for tested, accepted in zip(self.tested, self.accepted, strict=True):
            before = (accepted + before / 2) / (tested + 1)
            chances.append(left * before)
            left *= 1 - before
        return chances
