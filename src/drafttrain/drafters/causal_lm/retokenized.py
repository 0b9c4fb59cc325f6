"""Drafting with a language model that reads text in its own tokens, lossless.

N = nodes of a tree
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict, fixed_chain
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.across_tokenizers import Translation
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.target_model.other_tokenizer import OtherTokenizer, Reading
from drafttrain.target_model.positions import UNLIMITED_POSITIONS

if TYPE_CHECKING:
    import torch


class RetokenizedProposer:
    """Drafts in the drafter's own tokens and proposes the target's: verification is the ordinary one, on the target's ids.

    After every round the newest text is encoded again by the drafter's tokenizer, which may join the newest characters to tokens before
    them. What is cached stays as far as the tokens agree. Where the text ends inside a character, whose other bytes the target has yet
    to write, the drafter cannot read its end and drafts nothing in this round.

    Args:
        drafts: Drafts in the drafter's ids.
        translation: Makes the target's tokens of them.
    """

    needs = TargetNeeds()

    def __init__(self, drafts: ChainProposer, other: OtherTokenizer, translation: Translation) -> None:
        self._drafts = drafts
        self._other = other
        self._translation = translation
        self._contexts: list[Context] = []
        self._readings: list[Reading] = []
        self._drafted: list[Proposal] = []
        """In the drafter's ids."""

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences must be drafted one at a time; None: they can be batched."""
        # In the drafter's tokens they may be much longer.
        return self._drafts.why_one_at_a_time(UNLIMITED_POSITIONS)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read the prompts without their last own tokens."""
        self._contexts = list(contexts)
        self._readings = [self._other.read(context.tokens) for context in contexts]
        own = [
            Context(context.id, list(reading.ids), len(reading.ids))
            for context, reading in zip(contexts, self._readings, strict=True)
        ]
        self._drafts.begin(own, seen)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree if the budgets are wider than 1; only the root where the text ends in a character."""
        budgets = [
            budget if reading.complete else budget.within(0)
            for budget, reading in zip(budgets, self._readings, strict=True)
        ]
        roots = [context.tokens[-1] for context in self._contexts]

        def in_target_ids(step: DraftStep) -> bool | More:
            if step.token is None:
                return more(step)
            token = roots[step.sequence] if step.depth == 1 else self._translation.token(step.token)
            return more(replace(step, token=token))

        self._drafted = self._drafts.propose(budgets, sampling, generators, in_target_ids)
        translated = zip(self._contexts, budgets, self._drafted, strict=True)
        return [
            self._translation.proposal(*one) if one[-1].num_draft_tokens else fixed_chain(one[0].tokens[-1], [])
            for one in translated
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Read the committed text again."""
        pairs = zip(self._contexts, self._readings, strict=True)
        self._readings = [self._other.read(context.tokens, known) for context, known in pairs]
        self._drafts.continue_from([reading.ids for reading in self._readings], self._drafted)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._readings = [self._readings[i] for i in keep]
        self._drafts.drop(keep)
