"""Jacobi decoding: the target's own guesses of the last round are the next draft.

N = nodes, V = vocabulary
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.probability import likeliest
from drafttrain.core.proposals import Budget, Context, Proposal, Verdict, fixed_chain
from drafttrain.drafters.text_drafts import TextDrafts, nodes_along


class _Iterate:
    """The current guess of the next tokens of one text."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._guess: list[int] = []
        self._refined = 0

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        root, count = self._context.tokens[-1], min(budget.nodes, budget.depth)
        last = self._guess[-1] if self._guess else root
        self._guess = [*self._guess[:count], *[last] * (count - len(self._guess))]
        return replace(fixed_chain(root, self._guess), refined=self._refined)

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        """Take the likeliest token after each guess that is not committed: the next iterate."""
        (nodes,) = nodes_along(verdict.proposal, [self._guess])
        rejected = nodes[verdict.num_accepted :]
        self._guess = likeliest(logits_NV[torch.tensor(rejected).to(logits_NV.device)]).tolist() if rejected else []
        self._refined = self._refined + 1 if rejected else 0


class JacobiProposer(TextDrafts):
    """A FIXED chain, one iterate of the system y_i = argmax p(. | y_1 .. y_{i-1}); the committed tokens are its solved part.

    A round commits at least one token of the solution, so a block of n tokens takes at most n rounds.

    Source: Santilli et al. 2023, Accelerating Transformer Inference for Translation via Parallel Decoding, arXiv 2305.10427.
    """

    def start(self, context: Context) -> _Iterate:
        return _Iterate(context)
