"""Drafting chains with a causal LM that chooses an exit for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, DraftStep, More, Proposal
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.proposer import LMProposer
from drafttrain.drafters.sorted_lm.routed_lm import RoutedLM


class RoutedProposer(LMProposer):
    """Drafts while some exit is confident and the length policy wants more.

    Both decide by the distribution of the next token before it is drawn, so the output stays lossless.
    """

    def __init__(self, lm: RoutedLM, **options: Any) -> None:
        super().__init__(lm, **options)
        self._routed = lm

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence."""
        if any(budget.width > 1 for budget in budgets):
            raise CheckpointError("a drafter of kind sorted_lm drafts chains only: use a length policy of width 1")

        def confident(step: DraftStep) -> bool | More:
            return not self._routed.unsure[step.sequence] and more(step)

        return super().propose(budgets, sampling, generators, confident)
