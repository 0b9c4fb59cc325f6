"""Every draw and every decision of a round with a sampled tree, over tabular distributions: no sampling noise.

V = vocabulary, N = nodes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DrawMode, Proposal
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.tree_draft import TreeDraft
from drafttrain.eval.verification import walk
from tests.eval.test_verification import Script, distance, outcomes, random_distributions

Path = tuple[int, ...]
Tables = list[Tensor]
"""By level, the distribution after each path: tables[l][path]."""


class Branching(Script):
    """Leaves choices without probability out: fewer runs for the same distribution."""

    def accept(self, chance: float) -> bool:
        return chance >= 1 or (chance > 0 and super().accept(chance))

    def draw(self, probs_V: Tensor) -> int:
        possible = probs_V.nonzero()[:, 0].tolist()
        return int(possible[self._choose(probs_V[possible].tolist())])

    def children(self, probs_NV: Tensor, generators: Any, *, count: int, mode: DrawMode) -> tuple[Tensor, Tensor]:
        """Stands for `draw_in_order`."""
        tokens = torch.zeros(len(probs_NV), count, dtype=torch.long)
        probs = torch.zeros(len(probs_NV), count, dtype=torch.float64)
        for row, probs_V in enumerate(probs_NV):
            left_V = probs_V.clone()
            for place in range(count):
                if float(left_V.sum()) < 1e-12:
                    break
                token = self.draw(left_V / left_V.sum())
                tokens[row, place], probs[row, place] = token, left_V[token]
                if mode is DrawMode.WITHOUT_REPLACEMENT:
                    left_V[token] = 0
        return tokens, probs


@dataclass(frozen=True)
class Case:
    """A target p and a drafter q whose distributions are tables."""

    p: Tables
    q: Tables

    @classmethod
    def random(cls, vocabulary: int, *, levels: int, seed: int) -> Case:
        """Return random tables; every second one has zeros."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(vocabulary,) * (level + 1) for level in range(levels)]
        kind = ("spread", "zeros")[seed % 2]
        return cls(*([random_distributions(kind, shape, generator) for shape in shapes] for _ in range(2)))

    def drafted(self, budget: Budget, script: Branching, *, seed: int = 0) -> tuple[Proposal, list[Path]]:
        """Return a tree drawn from q, and the path of each node."""
        size = len(self.q[0])
        draft = TreeDraft(DraftVocabulary(None, num_tokens=size), size, draw=script.children)
        generator = torch.Generator().manual_seed(seed)
        trees = draft.begin([Context("", [0], 1)], [budget], Sampling(1.0), [generator], lambda step: True)
        read: list[Path] = []
        paths: list[Path] = [()]
        while trees.growing:
            trees.extend(torch.stack([self.q[len(path)][path] for path in paths]).log())
            paths = [(*(read[node.parent] if node.parent >= 0 else ()), node.token) for node in trees.frontiers[0]]
            read += paths
        (proposal,) = trees.proposals()
        found: list[Path] = [()]
        for token, parent in zip(proposal.tokens_N.tolist()[1:], proposal.parents_N.tolist()[1:], strict=True):
            found.append((*found[parent], token))
        return proposal, found

    def error(self, budget: Budget, *, change: Callable[[Proposal], Proposal] = lambda one: one) -> float:
        """Return the total variation distance of the first two tokens from the target's, over all draws and decisions."""

        def run(script: Script) -> Path:
            assert isinstance(script, Branching)
            proposal, paths = self.drafted(budget, script)
            target = TargetProbs.of(torch.stack([self.p[len(path)][path] for path in paths]))
            path, token = walk(change(proposal), target, script)
            tokens = [*paths[path[-1]], token]
            while len(tokens) < 2:
                tokens.append(script.draw(self.p[len(tokens)][tuple(tokens)]))
            return tuple(tokens[:2])

        return distance(outcomes(run, Branching), self.p)
