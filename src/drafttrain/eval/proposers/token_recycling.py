"""Token Recycling: a tree from the target's likeliest successors of each token, as it last computed them.

N = nodes, V = vocabulary
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, Proposal, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.proposers import TextProposer, proposers
from drafttrain.eval.proposers.token_tree import TokenTree

FIRST_RANK, DECAY = 0.4, 1.75
"""The successor of rank r is taken to be right with chance 0.4 / (r + 1) ** 1.75. The best 80 nodes then have depths of nearly
the published tree: 8, 23, 25, 17, 6, 1 nodes by level, where it has 8, 21, 25, 15, 8, 3."""


@dataclass
class TokenRecyclingSettings:
    """A tree from the target's likeliest successors of each token, as it last computed them."""

    successors: int = setting(8, help="Likeliest successors that are stored of each token.", ge=1)
    nodes: int = setting(80, help="Most nodes of the tree; eval.length may allow fewer.", ge=1)
    warm: bool = setting(
        False, help="Keep the table from prompt to prompt; else every prompt starts with an empty one."
    )


@cache
def best_paths(count: int, width: int) -> list[tuple[int, ...]]:
    """Return the ranks along each path of the tree with this many nodes, best first. A parent comes before its children."""
    scores = [math.log(FIRST_RANK) - DECAY * math.log(rank + 1) for rank in range(width)]
    waiting: list[tuple[float, tuple[int, ...]]] = [(-score, (rank,)) for rank, score in enumerate(scores)]
    heapq.heapify(waiting)
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        cost, path = heapq.heappop(waiting)
        found.append(path)
        for rank, score in enumerate(scores):
            heapq.heappush(waiting, (cost - score, (*path, rank)))
    return found


class _Recycled:
    """The table of successors, and one text that is drafted from it."""

    def __init__(self, context: Context, settings: TokenRecyclingSettings, table: dict[int, list[int]]) -> None:
        self._context = context
        self._settings = settings
        self._table = table

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        tree = TokenTree(self._context.tokens[-1], budget)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for path in best_paths(self._settings.nodes, self._settings.successors):
            parent = nodes.get(path[:-1])
            known = self._table.get(tree.tokens[parent], []) if parent is not None else []
            if parent is not None and path[-1] < len(known):
                node = tree.child(parent, known[path[-1]])
                if node is not None:
                    nodes[path] = node
        return tree.proposal()

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        """Store the successors of every node's token, also of rejected ones.

        Of nodes with the same token the last accepted one counts, else the last one: the result does not depend on the order
        in which a device writes.
        """
        tokens = verdict.proposal.tokens_N.tolist()
        accepted = set(verdict.path)
        order = [*(node for node in range(len(tokens)) if node not in accepted), *verdict.path]
        node_of = {tokens[node]: node for node in order}
        rows_NV = logits_NV[torch.tensor(list(node_of.values())).to(logits_NV.device)]
        best = rows_NV.topk(min(self._settings.successors, rows_NV.shape[-1]), dim=-1).indices.tolist()
        self._table.update(zip(node_of, best, strict=True))


@proposers.register("token_recycling", TokenRecyclingSettings)
class TokenRecycling(TextProposer):
    """A FIXED tree whose node of rank r is the r-th likeliest successor of its parent's token, where the target last read it.

    Source: Luo et al. 2024, Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling,
    arXiv 2408.08696. As there, prompts are not recorded, and the table is stored from prompt to prompt if it is warm.
    """

    def __init__(self, settings: TokenRecyclingSettings | None = None) -> None:
        self.settings = settings or TokenRecyclingSettings()
        self._table: dict[int, list[int]] = {}

    def start(self, context: Context) -> _Recycled:
        return _Recycled(context, self.settings, self._table if self.settings.warm else {})

    def forget(self) -> None:
        self._table.clear()
