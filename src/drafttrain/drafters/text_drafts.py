"""Proposers that draft each text on its own, with FIXED nodes.

N = nodes, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling


class TextDraft(Protocol):
    """Drafts the continuation of one text."""

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        """Return a proposal of FIXED nodes. Random choices use this generator, which decides nothing else."""
        ...

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        """Read what the target computed in this round: the logits after every node of the verified proposal."""
        ...


class TextDrafts:
    """Base class of these proposers: `start` returns the drafter of one text."""

    needs = TargetNeeds()

    def start(self, context: Context) -> TextDraft:
        """Return the drafter of a new text, whose tokens are appended to the context."""
        raise NotImplementedError

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts."""
        self._texts = [self.start(context) for context in contexts]

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one proposal a text. There is no distribution, so length policies cannot stop it early."""
        return [
            text.draft(budget, generator)
            for text, budget, generator in zip(self._texts, budgets, generators, strict=True)
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Let every text learn from its round."""
        for text, verdict, output in zip(self._texts, verdicts, seen, strict=True):
            assert output.logits_BTV is not None, "the target's call computes the logits of all nodes"
            text.learn(verdict, output.logits_BTV[0])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these texts."""
        self._texts = [self._texts[i] for i in keep]


def nodes_along(proposal: Proposal, paths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return, for each path of tokens from the root down, its nodes in a proposal, as far as they are there."""
    child: dict[tuple[int, int], int] = {}
    for node, (token, parent) in enumerate(zip(proposal.tokens_N.tolist(), proposal.parents_N.tolist(), strict=True)):
        child.setdefault((parent, token), node)
    return [_follow(child, tokens) for tokens in paths]


def _follow(child: Mapping[tuple[int, int], int], tokens: Sequence[int]) -> list[int]:
    path: list[int] = []
    for token in tokens:
        node = child.get((path[-1] if path else 0, token))
        if node is None:
            break
        path.append(node)
    return path
