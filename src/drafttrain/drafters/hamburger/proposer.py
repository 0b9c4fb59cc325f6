"""Drafting the rest of a segment with the micro decoder.

V = vocabulary, K = draft tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.hamburger.merged_lm import MergedLM


class MicroStepProposer:
    """Drafts until the stop head ends the segment, it is full, or the length policy wants no more.

    The target's call (`MergedLM`) reads the segment up to each draft token, and the last accepted one becomes the cache's entry.
    """

    needs = TargetNeeds()

    def __init__(self, *, vocab_size: int, num_tokens: int, draft: str) -> None:
        self._num_tokens = num_tokens
        self._draft = ChainDraft(DraftVocabulary(None, num_tokens=num_tokens), vocab_size, draft)
        self._contexts: list[Context] = []
        self._lm: MergedLM | None = None

    def share(self, target: object) -> None:
        """Store the target, which has the states that are drafted from."""
        if not isinstance(target, MergedLM):
            raise CheckpointError("kind hamburger drafts for the target that reads segments: use `Drafter.adapted`")
        self._lm = target

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts."""
        self._contexts = list(contexts)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain a sequence, within its segment."""
        lm = self._lm
        assert lm is not None, "the engine shares its target before it begins"
        budgets = [budget.within(lm.room(sequence)) for sequence, budget in enumerate(budgets)]
        complete: set[int] = set()

        def unless_complete(step: DraftStep) -> bool | More:
            return step.sequence not in complete and more(step)

        chains = self._draft.begin(self._contexts, budgets, sampling, generators, unless_complete)
        segments = [[*own, context.tokens[-1]] for own, context in zip(lm.open_segments(), self._contexts, strict=True)]
        rows: list[list[Tensor]] = [[] for _ in segments]
        while growing := chains.growing:
            logits_NV = lm.micro_logits(lm.micro_states(growing, [segments[number] for number in growing]))
            goes_on = lm.goes_on(segments)
            complete.update(number for number in growing if not goes_on[number])
            chains.extend(logits_NV[:, None])
            for number, logits_V in zip(growing, logits_NV, strict=True):
                if chains.drafted[number]:
                    rows[number].append(logits_V)
                    segments[number] += chains.drafted[number]
        proposals = chains.proposals()
        confidence = self._confidence(proposals, rows)
        return [replace(one, confidence=own) for one, own in zip(proposals, confidence, strict=True)]

    def _confidence(self, chains: Sequence[Proposal], rows: Sequence[Sequence[Tensor]]) -> list[list[float]]:
        """Return the probability that the micro decoder gave each draft token, by chain."""
        if not any(rows):
            return [[] for _ in chains]
        logits_NV = torch.stack([logits_V for own in rows for logits_V in own])
        drafted = [token for one in chains for token in one.tokens_N[1:].tolist()]
        probs_NV = logits_NV[:, : self._num_tokens].float().softmax(dim=-1)
        found: list[float] = probs_NV.gather(1, torch.tensor(drafted)[:, None].to(probs_NV.device))[:, 0].tolist()
        ends = list(accumulate(map(len, rows), initial=0))
        return [found[start:end] for start, end in pairwise(ends)]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Do nothing: the target has kept what was accepted."""

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
