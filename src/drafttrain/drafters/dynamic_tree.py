"""EAGLE-2's dynamic tree: it grows level by level at the likeliest nodes, then keeps the likeliest nodes of all levels.

M = nodes of the frontier, V = vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Proposal, fixed_tree


class DynamicTree:
    """The tree of one sequence. A node's score is the drafter's log-probability of the path to it.

    The tree depends only on the drafter's distributions and the committed text, and its nodes are FIXED: decoding stays
    lossless.

    Args:
        root: The last committed token.
        budget: Each frontier node gets up to `width` children. The best `width` nodes of a level are the next frontier.

    Source: Li et al. 2024, EAGLE-2, arXiv 2406.16858, 4.
    """

    def __init__(self, root: int, budget: Budget) -> None:
        self.budget = budget
        self.tokens = [root]
        self.parents = [-1]
        self.frontier = [0] if budget.nodes else []
        """Nodes whose children are drafted next; empty: the tree is complete."""
        self._scores = [0.0]
        self.depth = 0
        """Levels grown so far."""

    def grow(self, log_q_MV: Tensor, expand: list[bool] | None = None) -> None:
        """Add the children of the frontier.

        Args:
            log_q_MV: The drafter's log-probabilities after each frontier node.
            expand: Which frontier nodes get children; None: all.
        """
        width = min(self.budget.width, log_q_MV.shape[-1])
        best = log_q_MV.topk(width, dim=-1)
        # One read of the device for both; float64 holds scores and ids exactly.
        scores, tokens = torch.stack([best.values.double(), best.indices.double()]).tolist()
        self.add_level(tokens, scores, expand)

    def add_level(
        self, tokens: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], expand: list[bool] | None = None
    ) -> None:
        """Add the children of the frontier, which are known on the host.

        Args:
            tokens: Of each frontier node, its likeliest children, best first. Those without probability are left out.
            scores: Their log-probabilities.
            expand: Which frontier nodes get children; None: all.
        """
        first, width = len(self.tokens), self.budget.width
        for row, node in enumerate(self.frontier):
            if expand is not None and not expand[row]:
                continue
            for token, log_q in zip(tokens[row][:width], scores[row], strict=False):
                if log_q == -math.inf:
                    break
                self.tokens.append(int(token))
                self.parents.append(node)
                self._scores.append(self._scores[node] + log_q)
        self.depth += 1
        level = sorted(range(first, len(self.tokens)), key=lambda node: -self._scores[node])
        self.frontier = sorted(level[:width]) if self.depth < self.budget.depth else []

    def proposal(self) -> Proposal:
        """Return the likeliest nodes. A parent is at least as likely as its children, so it is kept and comes first."""
        ranked = sorted(range(1, len(self.tokens)), key=lambda node: (-self._scores[node], node))
        kept = sorted(ranked[: self.budget.nodes])
        place = {0: 0} | {node: number for number, node in enumerate(kept, start=1)}
        return fixed_tree(self.tokens[0], [(self.tokens[node], place[self.parents[node]]) for node in kept])
