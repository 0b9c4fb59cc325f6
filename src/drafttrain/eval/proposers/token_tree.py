"""A FIXED tree under construction: siblings have different tokens, and it stays within a budget."""

from __future__ import annotations

from collections.abc import Sequence

from drafttrain.core.proposals import Budget, Proposal, fixed_tree


class TokenTree:
    """Node 0 is the root."""

    def __init__(self, root: int, budget: Budget) -> None:
        self.tokens = [root]
        self._parents = [-1]
        self._depths = [0]
        self._children: list[dict[int, int]] = [{}]
        self._budget = budget

    def child(self, parent: int, token: int) -> int | None:
        """Return the child with this token. It is added if the budget allows it; None: it does not."""
        siblings, budget = self._children[parent], self._budget
        if token in siblings:
            return siblings[token]
        full = len(self.tokens) > budget.nodes or self._depths[parent] >= budget.depth or len(siblings) >= budget.width
        if full:
            return None
        self.tokens.append(token)
        self._parents.append(parent)
        self._depths.append(self._depths[parent] + 1)
        self._children.append({})
        siblings[token] = len(self.tokens) - 1
        return siblings[token]

    def add(self, tokens: Sequence[int], *, under: int = 0) -> list[int]:
        """Add a path below a node as far as the budget allows; return its nodes."""
        path: list[int] = []
        for token in tokens:
            node = self.child(path[-1] if path else under, token)
            if node is None:
                break
            path.append(node)
        return path

    def proposal(self) -> Proposal:
        """Return the tree."""
        return fixed_tree(self.tokens[0], list(zip(self.tokens[1:], self._parents[1:], strict=True)))
