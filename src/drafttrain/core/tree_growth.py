"""How the draft tree of one sequence grows in a round: the contract between a length policy and the drafters.

A drafter says what may come after a node. The growth decides which nodes are read next, and how many children a node gets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from drafttrain.core.proposals import Budget, DrawMode

Child = tuple[int, float]
"""A token that a node's child may have, and its log-probability in the drafter's distribution."""

Uniform = Callable[[], float]
"""Returns a random number of [0, 1) from the stream of the sequence."""


class TreeGrowth(ABC):
    """The nodes of one tree so far. Node 0 is the root; a parent comes before its children, siblings in draw order.

    What keeps a sampled tree lossless: a node's children are taken in the order in which they were drawn, and whether the next
    one is taken depends on what was taken before, never on its own token or on one drawn after it.
    """

    def __init__(self, root: int, budget: Budget) -> None:
        self.budget = budget
        self.tokens = [root]
        self.parents = [-1]
        self.depths = [0]
        self.frontier = [0] if budget.nodes else []
        """Nodes whose children are offered next; empty: the tree is complete."""

    @property
    def size(self) -> int:
        """Nodes without the root."""
        return len(self.tokens) - 1

    @property
    def wanted(self) -> int:
        """Children that a frontier node is offered, if there are so many."""
        return self.budget.width

    @abstractmethod
    def grow(self, children: Sequence[Sequence[Child]]) -> None:
        """Take children, and choose the next frontier.

        Args:
            children: By frontier node, its possible children in draw order: the likeliest first where they are not drawn.
        """

    def chosen(self) -> list[int]:
        """Return the nodes that are verified, in order, without the root: all. To leave drawn nodes out would be biased."""
        return list(range(1, len(self.tokens)))

    def add(self, parent: int, token: int) -> int:
        """Add a node and return its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1


class TreeForm(Protocol):
    """How trees grow, as a length policy asks for it in its `Budget`."""

    @property
    def draw(self) -> DrawMode:
        """How the children of one parent are drawn at temperature > 0."""
        ...

    def start(self, root: int, budget: Budget, uniform: Uniform | None) -> TreeGrowth:
        """Return a tree of its root only.

        Args:
            uniform: None: children are not drawn, but offered by falling probability: at temperature 0, or where the drafter is
                set to draft greedily.
        """
        ...

    def most_rows(self, budget: Budget) -> tuple[int, int]:
        """Return the most nodes of a tree whose children are drawn, and the most of them that one call of the drafter reads."""
        ...


def log_left(children: Sequence[Child], taken: int) -> float:
    """Return the logarithm of the probability that is left after the first children; -inf: nothing is."""
    left = 1.0 - math.fsum(math.exp(log_q) for _, log_q in children[:taken])
    return math.log(left) if left > 0 else -math.inf
