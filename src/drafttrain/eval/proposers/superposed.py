"""Superposed Decoding: several drafts for one forward of the drafter a level, which reads the mean of their newest tokens.

B = a batch of one, T = tokens of a call, V = vocabulary, D = hidden, K = drafts, C = candidates
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.layer_parallel import drafting_lm
from drafttrain.eval.proposers import Surroundings, proposers
from drafttrain.eval.proposers.language_model import language_model_of
from drafttrain.eval.proposers.ngram_counts import CorpusSettings, NgramCounts, share_after
from drafttrain.eval.proposers.token_tree import TokenTree


@dataclass
class SuperposedSettings(CorpusSettings):
    """Several drafts for one forward of the drafter a level, chosen with n-gram counts. The defaults are the published ones."""

    drafts: int = setting(3, help="Drafts; not more than the children that eval.length allows.", ge=1)
    candidates: int = setting(9, help="Likeliest tokens that the drafts continue with.", ge=1)
    temperature: float = setting(0.06, help="Divides the logits of the shared forward.", gt=0)
    ngram_weight: float = setting(
        0.54, help="Share of the n-grams' log-probability in the score of a token; 0: no n-grams.", ge=0, lt=1
    )
    context_weights: list[float] = setting(
        [0.01, 0.04, 0.15, 0.18, 0.12], help="Weights of the shares after the last 1, 2, ... tokens.", ge=0
    )
    penalty: float = setting(200.0, help="Is subtracted from the score of a draft that no n-gram continues.", ge=0)

    reads_drafter: ClassVar[bool] = True
    reads_language_model: ClassVar[bool] = True

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = super().check()
        if self.ngram_weight and not any(self.context_weights):
            problems.append("context_weights: all are 0, so no n-gram counts: set ngram_weight: 0")
        if self.corpus is not None and not self.ngram_weight:
            problems.append("corpus: is not used with ngram_weight 0")
        return problems


@dataclass(frozen=True)
class Draft:
    """One draft of a text."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0


class Superposition:
    """The drafts of one text in one round.

    Args:
        text: The committed text.
        counts: What scores their continuations; none: the drafter alone does.
        count: Drafts.
        levels: Tokens of a draft.
        ends: Tokens that end a text, and so a draft.
    """

    def __init__(
        self,
        text: Sequence[int],
        counts: Sequence[NgramCounts],
        settings: SuperposedSettings,
        *,
        count: int,
        levels: int,
        ends: Collection[int] = (),
    ) -> None:
        self._recent = tuple(text[-len(settings.context_weights) :])
        self._counts = counts if settings.ngram_weight else []
        self._settings = settings
        self._count = count
        self._left = levels if count else 0
        self._ends = ends
        self.alive = [Draft()]
        """The drafts that go on, best first."""
        self.ended: list[Draft] = []

    @property
    def grows(self) -> bool:
        """Whether the drafts need another forward."""
        return self._left > 0 and bool(self.alive)

    @property
    def newest(self) -> tuple[list[int], Tensor]:
        """The newest token of each draft, and weights_K: the drafts' probabilities, of which the sum is 1."""
        scores_K = torch.tensor([draft.score for draft in self.alive], dtype=torch.float64)
        return [draft.tokens[-1] for draft in self.alive], scores_K.softmax(dim=-1)

    def extend(self, logits_V: Tensor) -> None:
        """Continue all drafts from the one row of logits that they share."""
        best = (logits_V.double() / self._settings.temperature).topk(min(self._settings.candidates, len(logits_V)))
        tokens, log_p = best.indices.tolist(), best.values.log_softmax(dim=-1).tolist()
        found = [
            Draft((*draft.tokens, token), draft.score + score)
            for draft in self.alive
            for token, score in zip(tokens, self._scores(draft, tokens, log_p), strict=True)
            if score > -math.inf
        ]
        # Of equal scores the first counts, so the result does not depend on the order of a device.
        found.sort(key=lambda draft: -draft.score)
        self.ended += [draft for draft in found[: self._count] if draft.tokens[-1] in self._ends]
        self.alive = [draft for draft in found[: 2 * self._count] if draft.tokens[-1] not in self._ends][: self._count]
        self._left -= 1

    def _scores(self, draft: Draft, tokens: Sequence[int], log_p: Sequence[float]) -> list[float]:
        """Return what each token adds to the score of a draft; -inf: no n-gram continues with it, but with another one."""
        if not self._counts:
            return list(log_p)
        weight, before = self._settings.ngram_weight, (*self._recent, *draft.tokens)
        own = [(1 - weight) * one for one in log_p]
        shares = [self._share(before, token) for token in tokens]
        if not any(shares):
            return [one - self._settings.penalty for one in own]
        return [one + weight * math.log(share) if share else -math.inf for one, share in zip(own, shares, strict=True)]

    def _share(self, before: tuple[int, ...], token: int) -> float:
        weights = self._settings.context_weights[: len(before)]
        return sum(
            weight * share_after(self._counts, before[-size:], token) for size, weight in enumerate(weights, start=1)
        )

    def grow(self, tree: TokenTree) -> None:
        """Add the drafts to a tree, best first."""
        for draft in sorted([*self.alive, *self.ended], key=lambda draft: -draft.score):
            tree.add(draft.tokens)


@proposers.register("superposed", SuperposedSettings)
class Superposed:
    """A FIXED tree of the drafts: they depend on the committed text alone, so that the output is the target's at any temperature.

    What the drafter reads after the committed text is no text: it is never kept, and committed tokens are read as they are.

    Source: Shen et al. 2024, Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass, arXiv
    2405.18400. There the drafts are the output, and n-grams are those of a large corpus; here also of the text so far.
    """

    needs = TargetNeeds()

    def __init__(
        self,
        model: Any,
        settings: SuperposedSettings | None = None,
        *,
        num_tokens: int,
        ends: Collection[int] = (),
        corpus: Sequence[int] = (),
        listener: ForwardListener | None = None,
        layer_parallel_size: int = 1,
    ) -> None:
        self.settings = settings or SuperposedSettings()
        self._lm = drafting_lm(model, layer_parallel_size=layer_parallel_size, listener=listener)
        self._embedding = model.get_input_embeddings()
        self._num_tokens = num_tokens
        self._ends = frozenset(ends)
        self._corpus = self._fresh_counts()
        self._corpus.add(corpus)
        self._contexts: list[Context] = []
        self._counts: list[NgramCounts] = []
        """By sequence, those of its text."""
        self._counted: list[int] = []
        self._pending: list[int] = []
        """By sequence: how many committed tokens the last `propose` read."""

    @classmethod
    def create(cls, settings: SuperposedSettings, surroundings: Surroundings) -> Proposer:
        """Return the proposer of these settings."""
        target, drafter = surroundings.target, surroundings.drafter
        return cls(
            language_model_of(drafter, "superposed"),
            settings,
            num_tokens=target.num_tokens,
            ends=target.eos_token_ids,
            corpus=settings.corpus_tokens(target.tokenizer),
            listener=surroundings.listener,
            layer_parallel_size=1 if drafter is None else drafter.layer_parallel_size,
        )

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens must be drafted one at a time; None: they can be batched."""
        return self._lm.why_one_at_a_time(longest)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read the prompts without their last tokens."""
        self._contexts = list(contexts)
        self._counts = [self._fresh_counts() for _ in contexts]
        self._counted = [0] * len(contexts)
        self._lm.begin([context.tokens[:-1] for context in contexts])

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one tree a text. Its drafts have no distribution of their own, so length policies cannot stop them early."""
        self._count_text()
        growing = [self._start(*each) for each in zip(self._contexts, budgets, self._counts, strict=True)]
        inputs = [
            context.tokens[length:] if one.grows else []
            for context, length, one in zip(self._contexts, self._lm.lengths, growing, strict=True)
        ]
        self._pending, embedded = [len(tokens) for tokens in inputs], None
        while any(one.grows for one in growing):
            seen = self._lm.forward(inputs, needs=TargetNeeds(logits=True), embedded=embedded)
            for one, output in zip(growing, seen, strict=True):
                if one.grows:
                    assert output.logits_BTV is not None
                    one.extend(output.logits_BTV[0, -1, : self._num_tokens])
            inputs = [one.newest[0][:1] if one.grows else [] for one in growing]
            embedded = [self._mean(one) for one in growing]
        return [self._proposal(*each) for each in zip(self._contexts, budgets, growing, strict=True)]

    def _start(self, context: Context, budget: Budget, counts: NgramCounts) -> Superposition:
        """Return the drafts of a text, as many and as long as fit into its budget."""
        count = min(self.settings.drafts, budget.width, budget.nodes)
        return Superposition(
            context.tokens,
            [self._corpus, counts],
            self.settings,
            count=count,
            levels=min(budget.depth, budget.nodes // max(1, count)),
            ends=self._ends,
        )

    def _mean(self, one: Superposition) -> Tensor:
        """Return embedded_1D: the mean of the embeddings of the newest tokens, weighted by the probability of their drafts."""
        if not one.grows:
            return self._embedding.weight[:0]
        tokens, weights_K = one.newest
        embedded_KD = self._embedding(torch.tensor(tokens).to(self._lm.device)).detach()
        return weights_K.to(embedded_KD)[None] @ embedded_KD

    def _proposal(self, context: Context, budget: Budget, one: Superposition) -> Proposal:
        tree = TokenTree(context.tokens[-1], budget)
        one.grow(tree)
        return tree.proposal()

    def _count_text(self) -> None:
        if self.settings.ngram_weight:
            for place, (context, counts) in enumerate(zip(self._contexts, self._counts, strict=True)):
                counts.add(context.tokens, start=self._counted[place])
                self._counted[place] = len(context.tokens)

    def _fresh_counts(self) -> NgramCounts:
        return NgramCounts(longest=len(self.settings.context_weights))

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep the committed tokens in the cache, and drop all superposed ones."""
        if self._lm.lengths != self._lm.kept:
            self._lm.keep([range(count) for count in self._pending])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        for name in ("_contexts", "_counts", "_counted"):
            setattr(self, name, [getattr(self, name)[i] for i in keep])
        self._lm.drop(keep)
