"""Recursive speculative decoding, stochastic beam search: a level holds W paths, drawn without replacement from all paths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DrawMode
from drafttrain.core.settings import setting
from drafttrain.core.tree_growth import Child, TreeGrowth, Uniform, log_left
from drafttrain.eval.length import LengthSettings, WholeBudget, length_policies


@dataclass
class RsdSSettings(LengthSettings):
    """Draw the same number of paths on every level, without replacement (stochastic beam search)."""

    width: int = setting(4, help="Nodes of a level.", ge=2)
    depth: int = setting(5, help="Levels of the tree.", ge=1)

    @property
    def chain_length(self) -> int:
        """The levels of the tree."""
        return self.depth

    @property
    def most_children(self) -> int:
        """The width: one node may have all of them."""
        return self.width


@length_policies.register("rsd_s", RsdSSettings)
class RsdS(WholeBudget):
    """Unlikely paths end early, so the nodes go where the drafter's probability is.

    Source: Jeon et al. 2024, Recursive Speculative Decoding, arXiv 2402.14160, 3.2; Kool et al. 2019, Stochastic Beams and Where to
    Find Them, arXiv 1903.06059.
    """

    draw = DrawMode.WITHOUT_REPLACEMENT

    def __init__(self, settings: RsdSSettings | None = None) -> None:
        self.settings = settings or RsdSSettings()

    def budget(self, context: Context) -> Budget:
        width, depth = self.settings.width, self.settings.depth
        return Budget(width * depth, depth, width, form=self)

    def start(self, root: int, budget: Budget, uniform: Uniform | None) -> StochasticBeam:
        """Return a tree of its root only."""
        return StochasticBeam(root, budget, uniform)

    def most_rows(self, budget: Budget) -> tuple[int, int]:
        """Return the root and all levels but the last one, and a level."""
        level = min(budget.width, budget.nodes)
        return min(1 + (budget.depth - 1) * level, budget.nodes), level


class StochasticBeam(TreeGrowth):
    """A node has a perturbed log-probability G; the nodes with the largest G of a level are taken.

    Stochastic beam search perturbs the log-probability of every child with Gumbel noise, under the condition that the largest one is
    the parent's G. Here the same numbers are drawn in falling order. Which token has the k-th largest G is drawn from q without the
    tokens before it, and does not depend on the values. The largest is the parent's G; the k-th is a Gumbel variable, located at the
    logarithm of what is left of the path's probability without the tokens before, truncated at the one before. So a child is taken or
    not before its token is known, and the tree is lossless. Without draws it is a beam search.
    """

    def __init__(self, root: int, budget: Budget, uniform: Uniform | None) -> None:
        super().__init__(root, budget)
        self._uniform = uniform
        self._log_q = [0.0]
        """By node, the log-probability of its path."""
        self._perturbed = [0.0]

    def grow(self, children: Sequence[Sequence[Child]]) -> None:
        """Take the children with the largest G of all frontier nodes."""
        offered = [
            (value, node, own[rank])
            for node, own in zip(self.frontier, children, strict=True)
            for rank, value in enumerate(self._values(node, own[: self.budget.width]))
        ]
        count = min(self.budget.width, self.budget.nodes - self.size)
        # Values of one parent fall, so its children are taken in draw order; equal ones stay in it.
        best = sorted(range(len(offered)), key=lambda place: -offered[place][0])[:count]
        level = []
        for value, node, (token, log_q) in (offered[place] for place in sorted(best)):
            level.append(self.add(node, token))
            self._log_q.append(self._log_q[node] + log_q)
            self._perturbed.append(value)
        full = self.size >= self.budget.nodes or (level and self.depths[level[-1]] >= self.budget.depth)
        self.frontier = [] if full else level

    def _values(self, node: int, children: Sequence[Child]) -> Iterator[float]:
        """Yield G of each child."""
        if self._uniform is None:
            yield from (self._log_q[node] + log_q for _, log_q in children)
            return
        value = self._perturbed[node]
        for rank in range(len(children)):
            if rank:
                value = truncated_gumbel(self._log_q[node] + log_left(children, rank), value, self._uniform())
            yield value


def truncated_gumbel(location: float, most: float, uniform: float) -> float:
    """Return a Gumbel variable with this location, under the condition that it is at most `most`.

    F(g) = exp(-exp(location - g)) is inverted at u F(most): exp(-g) = exp(-most) + e exp(-location), where e = -log u is exponential.
    The logarithm of the sum is taken without leaving logarithms, as in the stable form of Kool et al. 2019, appendix B.3.
    """
    exponential = -math.log1p(-uniform)
    if location == -math.inf or exponential == 0:
        return -math.inf if location == -math.inf else most
    first, second = -most, math.log(exponential) - location
    larger = max(first, second)
    return -(larger + math.log1p(math.exp(-abs(first - second))))
