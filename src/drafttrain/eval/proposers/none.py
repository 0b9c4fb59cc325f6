"""No draft: plain autoregressive decoding by the same engine, the baseline of every speed-up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, Proposal, Verdict, fixed_chain
from drafttrain.eval.proposers import TextProposer, TrainingFree, proposers


@dataclass
class NoDraftSettings:
    """Draft nothing."""


@dataclass(frozen=True)
class _RootOnly:
    context: Context

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        return fixed_chain(self.context.tokens[-1], [])

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        pass


@proposers.register("none", NoDraftSettings)
class NoDraft(TextProposer):
    """Proposes only the root."""

    def __init__(self, settings: NoDraftSettings | None = None) -> None:
        self.settings = settings or NoDraftSettings()

    def start(self, context: Context) -> _RootOnly:
        return _RootOnly(context)


PLAIN = TrainingFree(NoDraftSettings())
"""Plain decoding, where a drafter could be."""
