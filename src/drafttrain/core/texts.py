"""Texts as records and prompts, and how their tokens are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the same rule is used on target and drafter rows."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""


@dataclass(frozen=True)
class LoggedDistribution:
    """What a log says of the target's law at the labels of a record, in their order: some tokens by name, the rest by its mass.

    K = tokens named at most
    """

    ids_NK: Any
    """int32 array; -1 where a row names fewer tokens."""
    log_probs_NK: Any
    """float32 array; -inf there. What the row's probabilities lack to 1 is the tail."""


@dataclass(frozen=True)
class Record:
    """One text with what is to be learned of it."""

    id: str
    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    """True where the token is a training label."""
    domain: str = ""
    sampling: Sampling | None = None
    """How the target drew the labelled tokens; None: it did not."""
    drawn_by: str = ""
    """Fingerprint or version of the model that drew them."""
    refused: Sequence[int] | None = None
    """Positions where the target refused the drafter's token (serving logs); None: not known."""
    num_rounds: int | None = None
    """Rounds of speculation that wrote the labelled tokens (serving logs); None: not known."""
    cache: str = ""
    """Where what the target knows of this record is stored; empty: nowhere."""
    law: LoggedDistribution | None = None
    """What a serving log says of the target's law; None: nothing."""


# ---------------------------------------------------------------- decoding


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    id: str
    tokens: Sequence[int]
    domain: str = ""
    answer: str = ""
    """The right answer, where a checker compares with one."""
