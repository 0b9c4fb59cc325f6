"""Texts as records and prompts, and how their tokens are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.core.images import Image


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. The same rule applies to target and drafter."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""


@dataclass(frozen=True)
class LoggedDistribution:
    """The target's distribution as a log stores it, at each label of a record: some tokens by id, the rest as one tail.

    N = labels, K = the most tokens stored per label
    """

    ids_NK: Any
    """int32 array; -1 where a row stores fewer tokens."""
    log_probs_NK: Any
    """float32 array; -inf there. The tail is 1 minus the sum of the row's probabilities."""


@dataclass(frozen=True)
class Record:
    """One text, and which of its tokens are labels."""

    id: str
    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    """True if the token is a training label."""
    domain: str = ""
    sampling: Sampling | None = None
    """How the target sampled the labels; None: it did not write them."""
    drawn_by: str = ""
    """Fingerprint or version of the model that sampled them."""
    refused: Sequence[int] | None = None
    """Positions where the target rejected the drafter's token (serving logs); None: unknown."""
    num_rounds: int | None = None
    """Rounds of speculative decoding that wrote the labels (serving logs); None: unknown."""
    cache: str = ""
    """Where the target's outputs on this record are cached; empty: nowhere."""
    logged: LoggedDistribution | None = None
    """The target's distribution from a serving log; None: not logged."""
    images: Sequence[Image] = ()
    """In the order of their tokens."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    id: str
    tokens: Sequence[int]
    domain: str = ""
    answer: str = ""
    """The correct answer, if a checker compares with one."""
    language: str = ""
    turn: int = 1
    """Place among the questions of its conversation."""
    conversation: str = ""
    """Id of the first turn's prompt; empty: this is the first turn."""
    questions: Sequence[str] = ()
    """Later questions of the conversation; each follows the target's own answer to the one before."""
    images: Sequence[Image] = ()
    """In the order of their tokens."""
    chat: Any = None
    """The chat up to this question (`data_gen.chat.Chat`), where later questions follow; None: none follow."""

    @property
    def unit(self) -> str:
        """What is drawn independently of the others: the turns of one conversation depend on each other."""
        return self.conversation or self.id
