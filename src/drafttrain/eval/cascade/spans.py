"""Spans of a text that two models share: who writes one, where it ends, and what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from drafttrain.core.generations import ForwardEvent


class Writer(Enum):
    """The two models."""

    LARGE = "large"
    SMALL = "small"


@dataclass(frozen=True)
class Unit:
    """Where a span ends: after a number of tokens, or with the token that completes one of these marks."""

    tokens: int | None = None
    """None: no limit of its own."""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    """What is to be written next."""

    writer: Writer
    unit: Unit
    num_before: int = 0
    """Tokens just before it that belong to the same unit: a mark may begin in them."""


@dataclass(frozen=True)
class Written:
    """A span as it was written."""

    writer: Writer
    start: int
    """Its first token, counted in the whole text."""
    tokens: Sequence[int]
    complete: bool
    """It ends with a mark of its unit."""
    entropies: Sequence[float] = ()
    """By token, the entropy in bits of its writer's distribution at temperature 1; empty: not asked for."""


@dataclass(frozen=True)
class CascadeGeneration:
    """One prompt's output by two models, and what it cost."""

    id: str
    tokens: Sequence[int]
    """The new tokens, including a final end of text."""
    num_by_large: int
    """Of these tokens, those that the large model wrote."""
    num_switches: int
    """Changes of the writer."""
    num_taken_back: int
    """Tokens of the small model that the large one replaced."""
    scores: Sequence[float]
    """What the judge gave, by judged span."""
    forwards: Sequence[ForwardEvent]
    """All calls of both models, the prompts included."""
    seconds: float
