"""Drafting chains: how far each may go, the length policy, the draws, and the proposals.

A kind computes the logits after the newest tokens; what to draft from them is decided here, the same for all kinds.

K = tokens that one call drafts of a chain, W = width of the drafter's head, R = tokens that can be drafted, D = hidden,
N = rows that tokens are drawn from, V = the target's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from drafttrain.core.probability import draw_each, sampling_probs
from drafttrain.core.proposals import Budget, Context, DraftStep, More, NodeKind, Proposal, chain
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary

Row = TypeVar("Row")


@dataclass
class _Chain:
    """The draft of one sequence, so far."""

    sequence: int
    tokens: list[int]
    """The root, then the draft tokens."""
    limit: int
    """Most draft tokens."""
    generator: torch.Generator
    q_rows: list[Tensor] = field(default_factory=list)
    """The distributions that the draft tokens were drawn from; empty if they are FIXED."""
    asked: int = 0
    """Draft tokens that the length policy was asked for."""
    ended: bool = False
    """The length policy stopped it."""

    @property
    def grows(self) -> bool:
        return not self.ended and self.asked < self.limit


class Chains:
    """The chains of one round, one per sequence. As long as some grow, compute their next logits and call `extend`."""

    def __init__(
        self,
        chains: Sequence[_Chain],
        *,
        vocabulary: DraftVocabulary,
        vocab_size: int,
        sampling: Sampling,
        fixed: bool,
        more: Callable[[DraftStep], bool | More],
    ) -> None:
        self._chains = chains
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._sampling = sampling
        self._fixed = fixed
        self._more = more
        self.drafted: list[list[int]] = [[] for _ in chains]
        """By sequence, the tokens that the last `extend` drafted."""

    @property
    def growing(self) -> list[int]:
        """The sequences whose chains grow. `extend` expects logits of these, in this order."""
        return [one.sequence for one in self._chains if one.grows]

    @property
    def newest(self) -> list[int]:
        """The newest token of each growing chain: the root, or the draft token whose successor is drafted next."""
        return [one.tokens[-1] for one in self._chains if one.grows]

    @property
    def inputs(self) -> list[list[int]]:
        """By sequence, the newest token of a growing chain, or none: the input of the next call of a language model."""
        return self.where_growing([one.tokens[-1:] for one in self._chains])

    def where_growing(self, rows: Sequence[list[Row]]) -> list[list[Row]]:
        """Return, by sequence, these rows of a growing chain, or none."""
        return [own if one.grows else [] for own, one in zip(rows, self._chains, strict=True)]

    def extend(
        self,
        logits: Tensor | Sequence[Tensor],
        states: Tensor | Sequence[Tensor] | None = None,
        confidence: Tensor | None = None,
    ) -> None:
        """Draft the next tokens of the growing chains. The device is read once for all.

        Args:
            logits: logits_KW of each growing chain, of its next K tokens. K is 1 where each distribution depends on the token
                before it. Chains of which one call gives all tokens are drafted by one call of this.
            states: states_KD that the logits were computed from, for a length policy that reads them.
            confidence: confidence_K, the logits of the predicted acceptance of these tokens.
        """
        wanted: list[tuple[_Chain, Tensor]] = []
        for row, one in enumerate([one for one in self._chains if one.grows]):
            states_KD = None if states is None else states[row]
            scores_K = None if confidence is None else confidence[row]
            for place, logits_R in enumerate(self._vocabulary.logits(logits[row])):
                state_D, score = (None if values is None else values[place] for values in (states_KD, scores_K))
                if one.grows and self._wants(one, logits_R, state_D, score):
                    wanted.append((one, logits_R))
        self._draw(wanted)

    def _wants(self, one: _Chain, logits_R: Tensor, state_D: Tensor | None, score: Tensor | None) -> bool:
        """Return whether the length policy wants a token from this distribution."""
        # Tokens of one call are drawn together, once the policy was asked for each: at the second the first is unknown.
        token = one.tokens[-1] if one.asked == len(one.tokens) - 1 else None
        one.asked += 1
        answer = self._more(DraftStep(one.sequence, one.asked, logits_R, state_D, token, score))
        one.ended = answer is not True
        return bool(answer)

    def _draw(self, wanted: Sequence[tuple[_Chain, Tensor]]) -> None:
        """Draw a token from each distribution, or take its argmax."""
        self.drafted = [[] for _ in self._chains]
        if not wanted:
            return
        rows = [logits_R for _, logits_R in wanted]
        logits_NR = rows[0][None] if len(rows) == 1 else torch.stack(rows)
        if self._fixed:
            # Not `argmax`, whose kernel for bfloat16 takes several times as long. Both return the first of equal maxima.
            places: list[int] = logits_NR.max(dim=-1).indices.tolist()
        else:
            probs_NR = sampling_probs(logits_NR, self._sampling)
            places = draw_each(probs_NR, [one.generator for one, _ in wanted])
            for (one, _), q_R in zip(wanted, probs_NR, strict=True):
                one.q_rows.append(q_R)
        for (one, _), token in zip(wanted, self._vocabulary.ids(places), strict=True):
            one.tokens.append(token)
            self.drafted[one.sequence].append(token)

    def proposals(self) -> list[Proposal]:
        """Return the chain of each sequence; drawn tokens with their distributions over the target's vocabulary."""
        return [self._proposal(one) for one in self._chains]

    def _proposal(self, one: _Chain) -> Proposal:
        if not one.q_rows:
            return chain(one.tokens, kind=NodeKind.FIXED)
        q_rows_NV = self._vocabulary.over_target(torch.stack(one.q_rows), size=self._vocab_size)
        return chain(one.tokens, kind=NodeKind.SAMPLED, q_rows_RV=q_rows_NV)


@dataclass(frozen=True)
class ChainDraft:
    """How a drafter drafts chains: by sampling, or by argmax, which is the same at temperature 0."""

    vocabulary: DraftVocabulary
    vocab_size: int
    """Of the target: the width of the rows of q."""
    draft: str = "sampled"
    """`sampled`, or `greedy`: FIXED tokens at every temperature, as engines draft that have no rows of q."""

    def begin(
        self,
        contexts: Sequence[Context],
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> Chains:
        """Return the chains of a round, which have their roots only. A budget of no nodes stays at that."""
        return Chains(
            [
                _Chain(number, context.tokens[-1:], min(budget.nodes, budget.depth), generator)
                for number, (context, budget, generator) in enumerate(zip(contexts, budgets, generators, strict=True))
            ],
            vocabulary=self.vocabulary,
            vocab_size=self.vocab_size,
            sampling=sampling,
            fixed=self.draft == "greedy" or sampling.temperature == 0,
            more=more,
        )
