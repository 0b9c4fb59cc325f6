"""DySpec: the next node goes where the drafter's own probabilities make acceptance likeliest."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DrawMode
from drafttrain.core.settings import setting
from drafttrain.core.tree_growth import Child, TreeGrowth, Uniform, log_left
from drafttrain.eval.length import LengthSettings, WholeBudget, length_policies


@dataclass
class DySpecSettings(LengthSettings):
    """Draw a tree without replacement whose next node is where the estimated acceptance is largest."""

    num_draft_tokens: int = setting(24, help="Nodes of the tree without its root, at most.", ge=1)
    threshold: float | None = setting(
        None,
        help="Grow level by level, and draw where the estimated acceptance is at least this; null: node by node from a heap, which "
        "takes more calls of the drafter.",
        gt=0,
        lt=1,
    )
    depth: int = setting(16, help="Levels of the tree at most.", ge=1)
    width: int = setting(8, help="Most children of a node.", ge=2)

    @property
    def chain_length(self) -> int:
        """A guess: rounds differ in depth."""
        return min(self.depth, self.num_draft_tokens, 5)

    @property
    def most_children(self) -> int:
        """The width."""
        return self.width


@length_policies.register("dyspec", DySpecSettings)
class DySpec(WholeBudget):
    """A place's worth is the path's probability, times what its earlier siblings left of their distribution.

    The drafter's probability stands for the target's. Without draws, where the next child is known, its own probability takes the
    place of what is left.

    Source: Xiong et al. 2024, DySpec, arXiv 2410.11744, algorithms 1 and 2.
    """

    draw = DrawMode.WITHOUT_REPLACEMENT

    def __init__(self, settings: DySpecSettings | None = None) -> None:
        self.settings = settings or DySpecSettings()

    def budget(self, context: Context) -> Budget:
        return Budget(self.settings.num_draft_tokens, self.settings.depth, self.settings.width, form=self)

    def start(self, root: int, budget: Budget, uniform: Uniform | None) -> WorthTree:
        """Return a tree of its root only."""
        drawn = uniform is not None
        if self.settings.threshold is None:
            return HeapTree(root, budget, drawn=drawn)
        return ThresholdTree(root, budget, drawn=drawn, least=math.log(self.settings.threshold))

    def most_rows(self, budget: Budget) -> tuple[int, int]:
        """Return bounds: all nodes but a last one have children, or are read in one call to see what children may be worth."""
        return budget.nodes, max(1, budget.nodes - 1)


class WorthTree(TreeGrowth):
    """A tree that knows what its places are worth. Nothing of a place's own token is in its worth, where it is drawn."""

    def __init__(self, root: int, budget: Budget, *, drawn: bool) -> None:
        super().__init__(root, budget)
        self._drawn = drawn
        self._log_q = [0.0]
        """By node, the log-probability of its path."""

    def worth(self, node: int, children: Sequence[Child], rank: int) -> float:
        """Return the logarithm of the worth of a node's child; -inf: it has none."""
        if rank >= min(len(children), self.budget.width):
            return -math.inf
        return self._log_q[node] + (log_left(children, rank) if self._drawn else children[rank][1])

    def take(self, node: int, child: Child) -> int:
        """Add a child and return its number."""
        self._log_q.append(self._log_q[node] + child[1])
        return self.add(node, child[0])


class HeapTree(WorthTree):
    """One node after the other, each at the place of largest worth.

    Where that place is below a node that the drafter has not read, all nodes like that are read, in one call.
    """

    def __init__(self, root: int, budget: Budget, *, drawn: bool) -> None:
        super().__init__(root, budget, drawn=drawn)
        self._places: list[tuple[float, int, int]] = []
        """(-worth, node, rank) of the next child of each node that was read."""
        self._children: dict[int, Sequence[Child]] = {}
        """By node that was read."""

    def grow(self, children: Sequence[Sequence[Child]]) -> None:
        """Take children as long as the best place is below a node that was read."""
        for node, own in zip(self.frontier, children, strict=True):
            self._children[node] = own
            self._offer(node, 0)
        unread: list[int] = []
        while self._places and self.size < self.budget.nodes:
            # The first child of an unread node is worth at most as much as the node.
            bound = max((self._log_q[node] for node in unread), default=-math.inf)
            if bound >= -self._places[0][0]:
                break
            _, node, rank = heapq.heappop(self._places)
            child = self.take(node, self._children[node][rank])
            self._offer(node, rank + 1)
            if self.depths[child] < self.budget.depth:
                unread.append(child)
        self.frontier = unread if self.size < self.budget.nodes else []

    def _offer(self, node: int, rank: int) -> None:
        worth = self.worth(node, self._children[node], rank)
        if worth > -math.inf:
            heapq.heappush(self._places, (-worth, node, rank))


class ThresholdTree(WorthTree):
    """Level by level: all places that are worth enough, the best ones first where the nodes do not suffice."""

    def __init__(self, root: int, budget: Budget, *, drawn: bool, least: float) -> None:
        super().__init__(root, budget, drawn=drawn)
        self._least = least

    def grow(self, children: Sequence[Sequence[Child]]) -> None:
        """Fill the next level."""
        places = [
            (worth, node, child)
            for node, own in zip(self.frontier, children, strict=True)
            for rank, child in enumerate(own)
            if (worth := self.worth(node, own, rank)) >= self._least
        ]
        # The worth of siblings falls, so they are taken in draw order.
        best = sorted(range(len(places)), key=lambda place: -places[place][0])[: self.budget.nodes - self.size]
        level = [self.take(node, child) for _, node, child in (places[place] for place in sorted(best))]
        self.frontier = [
            node for node in level if self._log_q[node] >= self._least and self.depths[node] < self.budget.depth
        ]
        if self.size == self.budget.nodes:
            self.frontier = []
