"""The evaluator decodes prompts by the conventions of a serving engine and counts rounds as the engine counts them.

Engines differ in three ways: whether the first token of an output comes before any draft, whether a round may draft past the
end of the output, and which tokens end a text. `Conventions` describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from drafttrain.core.generations import Generation
from drafttrain.core.proposals import Budget, DraftStep, More, Proposal
from drafttrain.core.roles import Proposer
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance.lossless import Lossless, LosslessSettings
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.serving.engines import Conventions, DecodedPrompt, Job
from drafttrain.serving.sides import Side
from drafttrain.target_model import Target

VLLM_CONVENTIONS = Conventions()


def evaluator_side(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    job: Job,
    *,
    num_draft_tokens: int,
    conventions: Conventions = VLLM_CONVENTIONS,
) -> Side:
    """Decode a job with the evaluator: by the target alone, and at every temperature of the job with the drafter."""
    lengths = {"max_new_tokens": job.max_new_tokens, "num_draft_tokens": num_draft_tokens}
    runs = []
    for temperature in job.temperatures:
        outputs = decode(target, drafter, prompts, Sampling(temperature), conventions=conventions, **lengths)
        runs.append([count_rounds(one, max_new_tokens=job.max_new_tokens, conventions=conventions) for one in outputs])
    alone = _engine(target, NoDraft(), Sampling(), max_new_tokens=job.max_new_tokens, num_draft_tokens=1)
    plain = [DecodedPrompt(up_to_end(one.tokens, conventions.end_tokens)) for one in alone.generate(prompts)]
    return Side(plain, *runs)


def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    conventions: Conventions = VLLM_CONVENTIONS,
) -> list[Generation]:
    """Decode prompts one by one as an engine does: the target's first token, then rounds of K draft tokens.

    Outputs run past `max_new_tokens` where the engine drafts past the end; `count_rounds` cuts them. Where the first
    token comes alone, the start of a round is counted after it.
    """
    lengths = {"num_draft_tokens": num_draft_tokens}
    alone = int(conventions.first_token_alone)
    first = _engine(target, NoDraft(), sampling, max_new_tokens=1, seed=1, **lengths).generate(prompts)
    begun = [list(one.tokens[:alone]) for one in first]
    longer = [replace(prompt, tokens=[*prompt.tokens, *tokens]) for prompt, tokens in zip(prompts, begun, strict=True)]
    # The last round starts before the end, so K further tokens hold all that it can write.
    most = max_new_tokens + num_draft_tokens if conventions.drafts_past_end else max_new_tokens - alone
    proposer = drafter.proposer(target)
    if conventions.draft_top_k:
        proposer = TopKProposer(proposer, conventions.draft_top_k)
    engine = _engine(target, proposer, sampling, max_new_tokens=most, **lengths)
    rest = [engine.generate([prompt])[0] for prompt in longer]
    return [
        replace(one, prompt_tokens=prompt.tokens, tokens=[*tokens, *one.tokens])
        for prompt, tokens, one in zip(prompts, begun, rest, strict=True)
    ]


def count_rounds(
    generation: Generation, *, max_new_tokens: int, conventions: Conventions = VLLM_CONVENTIONS
) -> DecodedPrompt:
    """Return an output of `decode` up to its end, with the counters of the rounds that started before it."""
    tokens = up_to_end(generation.tokens[:max_new_tokens], conventions.end_tokens)
    begun = int(conventions.first_token_alone)
    rounds = [one for one in generation.rounds if one.num_draft_tokens and begun + one.start < len(tokens)]
    # The last token of a round is the target's own: an engine that counts written tokens only cannot accept it.
    most = [len(tokens) - 1 - begun - one.start for one in rounds]
    accepted = [
        one.num_accepted if conventions.drafts_past_end else min(one.num_accepted, limit)
        for one, limit in zip(rounds, most, strict=True)
    ]
    deepest = max((one.max_depth for one in rounds), default=0)
    return DecodedPrompt(
        tokens=tokens,
        num_drafts=len(rounds),
        num_draft_tokens=sum(one.num_draft_tokens for one in rounds),
        num_accepted=sum(accepted),
        accepted_at=[sum(count >= i for count in accepted) for i in range(1, deepest + 1)],
    )


class TopKProposer:
    """A proposer that samples from the k likeliest tokens of its distribution only, as some engines do."""

    def __init__(self, proposer: Proposer, top_k: int) -> None:
        self.needs = proposer.needs
        self.begin, self.observe, self.drop = proposer.begin, proposer.observe, proposer.drop
        self._proposer = proposer
        self._top_k = top_k

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return proposals drawn from the truncated distribution."""
        return self._proposer.propose(budgets, replace(sampling, top_k=self._top_k), generators, more)


def _engine(
    target: Target, proposer: Any, sampling: Sampling, *, max_new_tokens: int, num_draft_tokens: int, seed: int = 0
) -> Engine:
    return Engine(
        target,
        proposer,
        rule=Lossless(LosslessSettings()),
        policy=FixedLength(FixedLengthSettings(num_draft_tokens)),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_tokens=(),
    )


def up_to_end(tokens: Sequence[int], end_tokens: frozenset[int]) -> list[int]:
    """Return a text up to the first token that ends one, that token included."""
    end = next((place for place, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return list(tokens[: end + 1])
