"""No draft: plain autoregressive decoding by the same engine, the baseline of every speed-up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict, fixed_chain
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.eval.proposers import TrainingFree, proposers


@dataclass
class NoDraftSettings:
    """Draft nothing."""


@proposers.register("none", NoDraftSettings)
class NoDraft:
    """Proposes only the root."""

    needs = TargetNeeds()

    def __init__(self, settings: NoDraftSettings | None = None) -> None:
        self.settings = settings or NoDraftSettings()

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        self._contexts = list(contexts)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        return [fixed_chain(context.tokens[-1], []) for context in self._contexts]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        pass

    def drop(self, keep: Sequence[int]) -> None:
        self._contexts = [self._contexts[i] for i in keep]


PLAIN = TrainingFree(NoDraftSettings())
"""Plain decoding, where a drafter could be."""
