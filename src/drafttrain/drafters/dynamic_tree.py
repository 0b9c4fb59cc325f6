"""EAGLE-2's dynamic tree: it grows level by level at the likeliest nodes, then keeps the likeliest nodes of all levels."""

from __future__ import annotations

from collections.abc import Sequence

from drafttrain.core.proposals import Budget
from drafttrain.core.tree_growth import Child, TreeGrowth


class DynamicTree(TreeGrowth):
    """The tree of a budget without a form. A node's score is the drafter's log-probability of the path to it.

    The tree depends only on the drafter's distributions and the committed text, and its nodes are FIXED at every temperature:
    so nodes can be left out at the end, and decoding stays lossless.

    Args:
        budget: Each frontier node gets up to `width` children. The best `width` nodes of a level are the next frontier.

    Source: Li et al. 2024, EAGLE-2, arXiv 2406.16858, 4.
    """

    def __init__(self, root: int, budget: Budget) -> None:
        super().__init__(root, budget)
        self._scores = [0.0]
        self._levels = 0

    def grow(self, children: Sequence[Sequence[Child]]) -> None:
        """Add the children of the frontier."""
        width, first = self.budget.width, len(self.tokens)
        for node, own in zip(self.frontier, children, strict=True):
            for token, log_q in own[:width]:
                self.add(node, token)
                self._scores.append(self._scores[node] + log_q)
        self._levels += 1
        level = sorted(range(first, len(self.tokens)), key=lambda node: -self._scores[node])
        self.frontier = sorted(level[:width]) if self._levels < self.budget.depth else []

    def chosen(self) -> list[int]:
        """Return the likeliest nodes. A parent is at least as likely as its children, so it is kept and comes first."""
        ranked = sorted(range(1, len(self.tokens)), key=lambda node: (-self._scores[node], node))
        return sorted(ranked[: self.budget.nodes])
