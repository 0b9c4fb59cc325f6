"""Drafting with look-ahead tokens: the target's call reads some after every node, and they predict the next round's draft.

V = vocabulary, K = look-ahead tokens, N = nodes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, RowsBeside, Verdict
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.chain_draft import ChainDraft


class LookAheadProposer:
    """Look-ahead token j after the last accepted node predicts the token j places after the next root.

    The first round of a text drafts nothing: its call reads the first look-ahead tokens.

    Args:
        ahead: Look-ahead tokens after every node.
        token: Their id.
        num_tokens: Ids that the tokenizer can produce.
    """

    needs = TargetNeeds()

    def __init__(self, *, ahead: int, token: int, vocab_size: int, num_tokens: int, draft: str) -> None:
        self._ahead = ahead
        self._token = token
        self._num_tokens = num_tokens
        self._draft = ChainDraft(DraftVocabulary(None, num_tokens=num_tokens), vocab_size, draft)
        self._contexts: list[Context] = []
        self._logits: list[Tensor | None] = []
        """By sequence, logits_KV at the look-ahead tokens of the last accepted node; None: none were read yet."""

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts."""
        self._contexts = list(contexts)
        self._logits = [None] * len(contexts)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain a sequence, and the look-ahead tokens that the call reads beside it."""
        budgets = [
            budget.within(0 if logits_KV is None else self._ahead)
            for budget, logits_KV in zip(budgets, self._logits, strict=True)
        ]
        chains = self._draft.begin(self._contexts, budgets, sampling, generators, more)
        known = [self._logits[sequence] for sequence in chains.growing]
        chains.extend([logits_KV for logits_KV in known if logits_KV is not None])
        return [
            replace(chain, beside=self._rows(chain), confidence=self._confidence(chain, logits_KV))
            for chain, logits_KV in zip(chains.proposals(), self._logits, strict=True)
        ]

    def _rows(self, chain: Proposal) -> RowsBeside:
        """Return the look-ahead tokens: a chain of them after every node."""
        parents: list[int] = []
        first = len(chain.tokens_N)
        for node in range(first):
            begin = first + node * self._ahead
            parents += [node, *range(begin, begin + self._ahead - 1)]
        return RowsBeside([self._token] * len(parents), parents)

    def _confidence(self, chain: Proposal, logits_KV: Tensor | None) -> list[float]:
        """Return the probability that the look-ahead tokens gave the draft tokens."""
        drafted = chain.tokens_N[1:].tolist()
        if logits_KV is None or not drafted:
            return []
        probs_KV = logits_KV[: len(drafted), : self._num_tokens].float().softmax(dim=-1)
        found: list[float] = probs_KV.gather(1, torch.tensor(drafted, device=probs_KV.device)[:, None])[:, 0].tolist()
        return found

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep the logits at the look-ahead tokens of the last accepted node."""
        self._logits = []
        for verdict, output in zip(verdicts, seen, strict=True):
            assert output.logits_BTV is not None, "the target's call computes the logits of all nodes"
            begin = len(verdict.proposal.tokens_N) + verdict.path[-1] * self._ahead
            # A copy: a view would keep the rows of all nodes through the next call.
            self._logits.append(output.logits_BTV[0, begin : begin + self._ahead].clone())

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._logits = [self._logits[i] for i in keep]
