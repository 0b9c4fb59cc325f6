"""RAPID: a drafter that reads only the parts of a long prompt that its end asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import DraftsWithOwnCache, Proposer
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.proposers import Surroundings, proposers
from drafttrain.eval.proposers.language_model import language_model_of
from drafttrain.eval.retrieval import Retriever, retrievers
from drafttrain.eval.retrieval.bm25 import Bm25Settings


@dataclass
class RapidSettings:
    """A drafter that reads only the parts of a long prompt that its end asks for."""

    context_tokens: int = setting(
        8192, help="Most tokens of a prompt that the drafter reads; shorter prompts are read whole.", ge=1
    )
    chunk_tokens: int = setting(512, help="Tokens of a chunk that is retrieved or left out.", ge=1)
    query_tokens: int = setting(
        256, help="Tokens at the prompt's end that are always read. They are the query of the retriever.", ge=1
    )
    first_tokens: int = setting(16, help="Tokens at the prompt's start that are always read.", ge=0)
    retriever: Any = setting(Bm25Settings(), help="What scores the chunks, by kind.", registry=retrievers)
    model: Literal["drafter", "target"] = setting(
        "drafter", help="What drafts: the drafter that is evaluated, or the target itself, after the shorter text."
    )

    nodes_come_first: ClassVar[bool] = True

    @property
    def reads_drafter(self) -> bool:
        """It uses the drafter that is evaluated."""
        return self.model == "drafter"

    @property
    def reads_language_model(self) -> bool:
        """It lets the drafter's language model read another text than the target's."""
        return self.model == "drafter"

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        least = self.first_tokens + self.chunk_tokens + self.query_tokens
        if self.context_tokens < least:
            return [
                f"context_tokens: {self.context_tokens} has no room for a chunk: first_tokens, chunk_tokens and query_tokens are {least}"
            ]
        return []


def shortened(tokens: Sequence[int], settings: RapidSettings, retriever: Retriever) -> list[int]:
    """Return what the drafter reads of a prompt: its start, the best chunks in the order of the text, its end."""
    if len(tokens) <= settings.context_tokens:
        return list(tokens)
    first, last = settings.first_tokens, len(tokens) - settings.query_tokens
    size = settings.chunk_tokens
    chunks = [tokens[start : min(start + size, last)] for start in range(first, last, size)]
    scores = retriever.scores(chunks, tokens[last:])
    found = [number for number, score in enumerate(scores) if score > -math.inf]
    room = (settings.context_tokens - first - settings.query_tokens) // size
    best = sorted(sorted(found, key=lambda number: -scores[number])[:room])
    return [*tokens[:first], *(token for number in best for token in chunks[number]), *tokens[last:]]


@proposers.register("rapid", RapidSettings)
class Rapid:
    """Drafts chains or trees after a shortened prompt. q is the drafter's distribution there, so that verification is lossless.

    Source: Chen et al. 2025, Long-Context Inference with Retrieval-Augmented Speculative Decoding, arXiv 2502.20330. Its target, moved
    towards the drafter, is the acceptance rule `mixed_target`, which is lossy. There the prompt is a template around text and question.
    """

    needs = TargetNeeds()

    def __init__(self, drafts: Proposer, retriever: Retriever, settings: RapidSettings | None = None) -> None:
        self.settings = settings or RapidSettings()
        self._drafts = drafts
        self._retriever = retriever
        self._contexts: list[Context] = []
        self._own: list[Context] = []
        """By sequence, what the drafter has read."""
        self._read: list[int] = []
        """By sequence, tokens of the context up to the end of what the drafter has read."""

    @classmethod
    def create(cls, settings: RapidSettings, surroundings: Surroundings) -> Proposer:
        """Return the proposer of these settings."""
        target, drafter, listener = surroundings.target, surroundings.drafter, surroundings.listener
        drafts: Proposer
        if settings.model == "target":
            drafts = ChainProposer(
                target.model, target_vocab_size=target.vocab_size, num_tokens=target.num_tokens, listener=listener
            )
        else:
            language_model_of(drafter, "rapid")
            assert drafter is not None
            drafts = drafter.proposer(target, listener)
        return cls(drafts, retrievers.build(settings.retriever, target), settings)

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens must be drafted one at a time; None: they can be batched."""
        return self._drafts.why_one_at_a_time(longest) if isinstance(self._drafts, DraftsWithOwnCache) else None

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Shorten the prompts, and read them without their last tokens."""
        self._contexts = list(contexts)
        texts = [shortened(context.tokens, self.settings, self._retriever) for context in contexts]
        self._own = [Context(one.id, text, len(text)) for one, text in zip(contexts, texts, strict=True)]
        self._read = [len(context.tokens) for context in contexts]
        self._drafts.begin(self._own, seen)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return the drafter's proposals after the shorter texts."""
        return self._drafts.propose(budgets, sampling, generators, more)

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Append the committed tokens to the shorter texts, and let the drafter update its cache."""
        for place, (context, own) in enumerate(zip(self._contexts, self._own, strict=True)):
            own.tokens += context.tokens[self._read[place] :]
            self._read[place] = len(context.tokens)
        self._drafts.observe(verdicts, seen)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._own = [self._own[i] for i in keep]
        self._read = [self._read[i] for i in keep]
        self._drafts.drop(keep)
