"""Jacobi decoding: the target's own guesses of the last round are the next draft.

N = nodes, V = vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.probability import likeliest
from drafttrain.core.proposals import Budget, Context, Proposal, Verdict, fixed_chain
from drafttrain.eval.proposers import TextProposer, proposers
from drafttrain.eval.proposers.token_tree import nodes_along


@dataclass
class JacobiSettings:
    """The target's likeliest tokens after the rejected ones of the last round."""


class _Iterate:
    """The current guess of the next tokens of one text."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._guess: list[int] = []

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        root, count = self._context.tokens[-1], min(budget.nodes, budget.depth)
        last = self._guess[-1] if self._guess else root
        self._guess = [*self._guess[:count], *[last] * (count - len(self._guess))]
        return fixed_chain(root, self._guess)

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        """Take the likeliest token after each guess that is not committed: the next iterate."""
        (nodes,) = nodes_along(verdict.proposal, [self._guess])
        rejected = nodes[verdict.num_accepted :]
        self._guess = likeliest(logits_NV[torch.tensor(rejected).to(logits_NV.device)]).tolist() if rejected else []


@proposers.register("jacobi", JacobiSettings)
class Jacobi(TextProposer):
    """A FIXED chain, one iterate of the system y_i = argmax p(. | y_1 .. y_{i-1}); the committed tokens are its solved part.

    A round commits at least one token of the solution, so a block of n tokens takes at most n rounds.

    Source: Santilli et al. 2023, Accelerating Transformer Inference for Translation via Parallel Decoding, arXiv 2305.10427.
    """

    def __init__(self, settings: JacobiSettings | None = None) -> None:
        self.settings = settings or JacobiSettings()

    def start(self, context: Context) -> _Iterate:
        return _Iterate(context)
