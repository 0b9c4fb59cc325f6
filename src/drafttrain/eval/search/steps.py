"""Samples the next step of a partial solution: speculatively, from a fork of its cache, with every token of the target counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.generations import ForwardEvent, Round
from drafttrain.core.proposals import Context
from drafttrain.core.roles import DraftsInTarget, LengthPolicy, Proposer
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.forked_cache import CachedText, cached_text, continue_from


class Partial(Protocol):
    """A partial solution."""

    @property
    def text(self) -> str:
        """Its steps, without the prompt."""
        ...

    @property
    def ended(self) -> bool:
        """Whether no step follows."""
        ...


class Steps(Protocol):
    """Samples steps, and counts what that costs."""

    @property
    def spent(self) -> int:
        """Tokens that the target has read so far, but for prompts: each is read once, whatever follows."""
        ...

    def start(self, prompt: Prompt) -> Any:
        """Return the partial solution without a step."""
        ...

    def next(self, partial: Any, number: int) -> Any:
        """Return a continuation by one step; numbers of draws with the same prompt differ, and make them independent."""
        ...


@dataclass(frozen=True)
class CachedPartial:
    """A partial solution of a target, and its keys and values without those of the last token."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """With the prompt."""
    text: str
    ended: bool
    cache: CachedText


class SampledSteps:
    """Draws steps from the target's own distribution with the engine.

    Args:
        proposer: Drafts within a step. It must read nothing of the target: a step begins with what was cached before.
        delimiter: A step ends with a token whose text contains it.
        max_step_tokens: A longer step ends there.
        max_new_tokens: A longer solution ends there.

    Raises:
        DataError: No token contains the delimiter.
        CheckpointError: The proposer reads the target's states, or drafts with its blocks.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        *,
        sampling: Sampling,
        delimiter: str,
        max_step_tokens: int,
        max_new_tokens: int,
        policy: LengthPolicy | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(proposer, DraftsInTarget) or proposer.needs != TargetNeeds():
            raise CheckpointError(
                f"search: {type(proposer).__name__} reads the target while it reads the prompt: use a drafter.kind causal_lm, or none"
            )
        self._target = target
        self._max_step_tokens = max_step_tokens
        self._max_new_tokens = max_new_tokens
        self._start: CachedPartial | None = None
        self._from: CachedText | None = None
        self._lm: CachedLM | None = None
        self._after: list[CachedText] = []
        self.spent = 0
        self._engine = Engine(
            target,
            proposer,
            rule=Lossless(),
            policy=policy or FixedLength(),
            sampling=sampling,
            max_new_tokens=max_step_tokens,
            seed=seed,
            listener=self._count,
            stop_tokens=[*target.eos_token_ids, *tokens_with(delimiter, target)],
            prefill=self._continue,
        )

    def start(self, prompt: Prompt) -> CachedPartial:
        """Return the partial solution without a step; a prompt is read once, and its tokens do not count."""
        if self._start is not None and self._start.prompt == prompt:
            return self._start
        lm = CachedLM(self._target.model, name="target")
        lm.begin([prompt.tokens[:-1]])
        cached = cached_text(lm, len(prompt.tokens) - 1)
        self._start = CachedPartial(prompt, tuple(prompt.tokens), "", False, cached)
        return self._start

    def next(self, partial: CachedPartial, number: int) -> CachedPartial:
        """Return a continuation by one step. Its random numbers are those of the prompt and of the draw's number."""
        assert not partial.ended, "a solution that has ended has no next step"
        self._from = partial.cache
        left = self._max_new_tokens - (len(partial.tokens) - len(partial.prompt.tokens))
        self._engine.max_new_tokens = min(self._max_step_tokens, left)
        prompt = replace(partial.prompt, id=f"{partial.prompt.id}/{number}", tokens=partial.tokens)
        (generation,) = self._engine.generate([prompt], on_round=self._keep)
        tokens = (*partial.tokens, *generation.tokens)
        num_new = len(tokens) - len(partial.prompt.tokens)
        return CachedPartial(
            partial.prompt,
            tokens,
            self._target.tokenizer.decode(tokens[-num_new:], skip_special_tokens=True),
            tokens[-1] in self._target.eos_token_ids or num_new >= self._max_new_tokens,
            self._after.pop(),
        )

    def _continue(self, lm: CachedLM, prompts: Sequence[Prompt], needs: TargetNeeds) -> list[TargetOutput]:
        """Begin with a fork of the cache, in place of reading the text again."""
        assert self._from is not None
        self._lm = lm
        continue_from(lm, self._from)
        return [TargetOutput() for _ in prompts]

    def _keep(self, context: Context, last: Round) -> None:
        if last.reason in ("eos", "length"):
            assert self._lm is not None
            # An accepted end of a step is cached too, and the next call reads it.
            self._after.append(cached_text(self._lm, len(context.tokens) - 1))

    def _count(self, event: ForwardEvent) -> None:
        self.spent += event.shape.num_tokens


def tokens_with(delimiter: str, target: Target) -> list[int]:
    """Return the tokens whose text contains a delimiter.

    Raises:
        DataError: There is none.
    """
    texts = target.tokenizer.batch_decode([[token] for token in range(target.num_tokens)])
    found = [token for token, text in enumerate(texts) if delimiter and delimiter in text]
    if not found:
        raise DataError(f"no token of {target.name} contains the delimiter {delimiter!r}: choose one that ends a token")
    return found
