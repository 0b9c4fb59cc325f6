"""Routing at random: the writer of each span is drawn. The baseline that every router must beat at its own rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from drafttrain.core.settings import setting
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.engine import CascadeEngine
from drafttrain.eval.cascade.router import CascadeSettings, Decoder, Pair, Router
from drafttrain.eval.cascade.spans import Span, Unit, Writer


@dataclass
class RandomSettings(CascadeSettings):
    """Draw the writer of each span."""

    rate: float = setting(0.5, help="Chance that the large model writes a span. 1: it writes all; 0: none.", ge=0, le=1)
    tokens: int | None = setting(None, help="Tokens of a span at most; null: no limit.", ge=1)
    marks: list[str] = setting([], help="A span ends with the token that completes one of these texts.")

    swept: ClassVar[str] = "rate"
    values: ClassVar[Sequence[float]] = (0.1, 0.25, 0.5, 0.75, 0.9)

    @property
    def unit(self) -> Unit:
        """A span."""
        return Unit(self.tokens, tuple(self.marks))

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.tokens is None and not self.marks:
            return ["tokens: null needs marks: one draw would decide the whole text"]
        return []


@cascades.register("random", RandomSettings)
class Random(Router):
    """Spans by independent draws."""

    def __init__(self, settings: RandomSettings) -> None:
        self.settings = settings

    @classmethod
    def create(cls, settings: RandomSettings, pair: Pair) -> Decoder:
        """Return the decoder of these settings."""
        return CascadeEngine(pair, cls(settings))

    def begin(self, generator: torch.Generator) -> None:
        """Start a new text."""
        self._generator = generator

    def next(self) -> Span:
        """Draw the writer."""
        large = float(torch.rand((), dtype=torch.float64, generator=self._generator)) < self.settings.rate
        return Span(Writer.LARGE if large else Writer.SMALL, self.settings.unit)


def at_rate(rate: float, unit: Unit) -> RandomSettings:
    """Return random routing of these units."""
    return RandomSettings(rate, unit.tokens, list(unit.marks))
