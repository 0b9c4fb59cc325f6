"""Trees whose shape is known before the round: how many children each place has. Their tokens are drawn, or the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.proposals import Budget, DrawMode
from drafttrain.core.tree_growth import Child, TreeGrowth, Uniform
from drafttrain.eval.length import LengthSettings

Shape = tuple["Shape", ...]
"""The children of a place in draw order, each with the shape below it."""

MOST_NODES = 1024
"""Nodes of a tree at most: the target's logits of all of them are in memory at once."""


def full_shape(branching: Sequence[int]) -> Shape:
    """Return the tree in which every place of a level has as many children as the next level's number says."""
    shape: Shape = ()
    for count in reversed(branching):
        shape = (shape,) * count
    return shape


def count_nodes(shape: Shape) -> int:
    """Return the nodes below a place."""
    return sum(1 + count_nodes(child) for child in shape)


def count_levels(shape: Shape) -> int:
    """Return the levels below a place."""
    return max((1 + count_levels(child) for child in shape), default=0)


def most_children(shape: Shape) -> int:
    """Return the children of the place that has most."""
    return max(len(shape), *(most_children(child) for child in shape), 0)


def nodes_of(branching: Sequence[int]) -> int:
    """Return the nodes of a full tree, without building it."""
    level = total = 0
    for number, count in enumerate(branching):
        level = count * (level if number else 1)
        total += level
    return total


class BranchingSettings(LengthSettings):
    """Base class of settings with a number of children for all nodes of a level."""

    branching: list[int]

    @property
    def chain_length(self) -> int:
        """The levels of the tree."""
        return len(self.branching)

    @property
    def most_children(self) -> int:
        """The largest number of children."""
        return max(self.branching)

    def check(self) -> list[str]:
        """Return what is wrong with the numbers of children."""
        if not self.branching:
            return ["branching: at least one level is needed, as [3, 2, 1]"]
        if (nodes := nodes_of(self.branching)) > MOST_NODES:
            return [f"branching: {list(self.branching)} is a tree of {nodes} nodes, at most {MOST_NODES} are allowed"]
        return []


@dataclass(frozen=True)
class StaticForm:
    """A given shape, filled level by level."""

    shape: Shape
    draw: DrawMode

    def start(self, root: int, budget: Budget, uniform: Uniform | None) -> StaticTree:
        """Return a tree of its root only."""
        return StaticTree(root, budget, self.shape)

    def most_rows(self, budget: Budget) -> tuple[int, int]:
        """Return the places that have children, and those of the level with most of them."""
        level, counts = [self.shape], list[int]()
        while level and len(counts) < budget.depth:
            counts.append(sum(bool(shape) for shape in level))
            level = [child for shape in level for child in shape]
        return min(sum(counts), budget.nodes), min(max(counts, default=0), budget.nodes)

    def budget(self) -> Budget:
        """Return the budget of a whole tree. A shape of one child each is a chain, and is drafted as such."""
        nodes, width = count_nodes(self.shape), most_children(self.shape)
        return Budget(nodes, count_levels(self.shape), max(1, width), form=self if width > 1 else None)


class StaticTree(TreeGrowth):
    """The places of a shape, as far as the budget and the tokens with probability go."""

    def __init__(self, root: int, budget: Budget, shape: Shape) -> None:
        super().__init__(root, budget)
        self._below = {0: shape}

    @property
    def wanted(self) -> int:
        """The most children of a place of the frontier."""
        return max((len(self._below[node]) for node in self.frontier), default=0)

    def grow(self, children: Sequence[Sequence[Child]]) -> None:
        """Fill the next level."""
        level = []
        for node, own in zip(self.frontier, children, strict=True):
            seen: set[int] = set()
            for (token, _), below in zip(own, self._below[node], strict=False):
                if self.size == self.budget.nodes:
                    break
                child = self.add(node, token)
                # The second draw of the same token is never accepted after the first was rejected: nothing below it would be read.
                if below and token not in seen and self.depths[child] < self.budget.depth:
                    self._below[child] = below
                    level.append(child)
                seen.add(token)
        self.frontier = level if self.size < self.budget.nodes else []
