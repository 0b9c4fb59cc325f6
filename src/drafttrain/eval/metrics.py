"""From generations to rates: counts by prompt are added up and divided once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drafttrain.core.generations import Generation, Round
from drafttrain.core.texts import Prompt
from drafttrain.eval.repetition import tokens_before_repetition


@dataclass(frozen=True)
class PromptCounts:
    """Counts of one prompt."""

    id: str
    domain: str
    num_tokens: int
    num_rounds: int
    num_draft_tokens: int
    num_accepted: int
    accepted_at: tuple[int, ...]
    """Rounds that accepted at least i draft tokens, i = 1, 2, ..."""
    reached_at: tuple[int, ...]
    """Rounds that drafted at least i deep and accepted at least i - 1."""
    language: str = ""
    turn: int = 1
    conversation: str = ""
    """Id of the conversation's first prompt; empty: the prompt is the first."""
    context: int | None = None
    """Tokens of the prompt; None: a result of an earlier version."""

    @property
    def unit(self) -> str:
        """What intervals count as one: the turns of one conversation depend on each other."""
        return self.conversation or self.id


def counted_rounds(generation: Generation, *, repetition_ngram: int) -> Sequence[Round]:
    """Return the rounds that begin before the output repeats one of its n-grams; 0: all rounds."""
    if repetition_ngram == 0:
        return generation.rounds
    end = tokens_before_repetition(list(generation.tokens), ngram=repetition_ngram)
    return [one for one in generation.rounds if one.start < end]


def counts_of(generation: Generation, prompt: Prompt | None = None, *, repetition_ngram: int = 0) -> PromptCounts:
    """Return the counts of one prompt.

    Args:
        prompt: Where its language and its place in a conversation come from.
    """
    about = prompt or Prompt(generation.id, generation.prompt_tokens)
    rounds = counted_rounds(generation, repetition_ngram=repetition_ngram)
    depth = max((one.max_depth for one in rounds), default=0)
    return PromptCounts(
        id=generation.id,
        domain=generation.domain,
        num_tokens=sum(one.num_emitted for one in rounds),
        num_rounds=len(rounds),
        num_draft_tokens=sum(one.num_draft_tokens for one in rounds),
        num_accepted=sum(one.num_accepted for one in rounds),
        accepted_at=tuple(sum(one.num_accepted >= i for one in rounds) for i in range(1, depth + 1)),
        reached_at=tuple(
            sum(one.max_depth >= i and one.num_accepted >= i - 1 for one in rounds) for i in range(1, depth + 1)
        ),
        language=about.language,
        turn=about.turn,
        conversation=about.conversation,
        context=len(about.tokens),
    )


@dataclass(frozen=True)
class Totals:
    """Counts summed over prompts, and their rates."""

    num_tokens: int
    num_rounds: int
    num_draft_tokens: int
    num_accepted: int
    accepted_at: tuple[int, ...]
    reached_at: tuple[int, ...]

    @property
    def block_efficiency(self) -> float:
        """Tokens per target call, the target's own token included."""
        return self.num_tokens / self.num_rounds

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted; nan where nothing was drafted."""
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else float("nan")

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of all rounds that accepted the i-th draft token. 1 + their sum is the block efficiency, except for cut texts."""
        return [count / self.num_rounds for count in self.accepted_at]

    @property
    def conditional_acceptance(self) -> list[float]:
        """Share that accepted the i-th draft token, of the rounds that drafted it and accepted the one before."""
        return [a / b if b else float("nan") for a, b in zip(self.accepted_at, self.reached_at, strict=True)]


def totals_of(counts: Sequence[PromptCounts]) -> Totals:
    """Return the sums over prompts."""
    return Totals(
        num_tokens=sum(c.num_tokens for c in counts),
        num_rounds=sum(c.num_rounds for c in counts),
        num_draft_tokens=sum(c.num_draft_tokens for c in counts),
        num_accepted=sum(c.num_accepted for c in counts),
        accepted_at=_by_depth([c.accepted_at for c in counts]),
        reached_at=_by_depth([c.reached_at for c in counts]),
    )


def over_seeds(repetitions: Sequence[Sequence[PromptCounts]]) -> list[PromptCounts]:
    """Return the counts of every prompt, summed over repetitions of one experiment: a prompt's repetitions depend on each other.

    Args:
        repetitions: The counts of the same prompts in the same order, once for each seed.
    """
    assert len({tuple(one.id for one in counts) for counts in repetitions}) == 1
    return [replace(same[0], **vars(totals_of(same))) for same in zip(*repetitions, strict=True)]


def _by_depth(counts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, itertools.zip_longest(*counts, fillvalue=0)))


def histogram(generations: Sequence[Generation]) -> dict[str, int]:
    """Return the number of rounds that accepted 0, 1, ... draft tokens."""
    counted = Counter(one.num_accepted for generation in generations for one in generation.rounds)
    return {str(number): counted[number] for number in sorted(counted)}


def mbsu(*, num_tokens: int, num_rounds: int, plain_bytes: float, bytes_read: float) -> float:
    """Return the memory-bound speed-up: block efficiency x bytes of a plain call / bytes of a mean round.

    Args:
        num_tokens, num_rounds: Their ratio is the block efficiency. Rounds are counted by sequence, also where several
            sequences are decoded together.
        plain_bytes: Bytes that plain calls would have read, one for each target call, for the same sequences.
        bytes_read: Bytes that all forwards of the same rounds read.
    """
    return num_tokens / num_rounds * plain_bytes / bytes_read
