"""FoReaL-Decoding: the large model leads some sentences with their first tokens, and the small one follows. LOSSY."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from drafttrain.core.settings import setting
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.boundary import SENTENCE
from drafttrain.eval.cascade.engine import CascadeEngine
from drafttrain.eval.cascade.router import CascadeSettings, Decoder, Pair, Router
from drafttrain.eval.cascade.spans import Span, Unit, Writer, Written


@dataclass
class ForealSettings(CascadeSettings):
    """Let the large model lead sentences."""

    rho: float = setting(0.5, help="Chance that the large model leads a sentence.", ge=0, le=1)
    lead_tokens: int | None = setting(15, help="First tokens of a sentence that it leads; null: the whole of it.", ge=1)
    marks: list[str] = setting(list(SENTENCE), help="A sentence ends with the token that completes one of these texts.")

    swept: ClassVar[str] = "rho"
    values: ClassVar[Sequence[float]] = (0.2, 0.4, 0.6, 0.8, 1.0)

    @property
    def unit(self) -> Unit:
        """A sentence."""
        return Unit(None, tuple(self.marks))

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return [] if self.marks else ["marks: at least one is needed: they end a sentence"]


@cascades.register("foreal", ForealSettings)
class Foreal(Router):
    """At rho 0 the small model writes alone; at rho 1 with lead_tokens null the large one.

    Source: Li et al. 2025, FoReaL-Decoding, arXiv 2506.07160. Which tokens end a sentence is this project's choice.
    """

    def __init__(self, settings: ForealSettings) -> None:
        self.settings = settings

    @classmethod
    def create(cls, settings: ForealSettings, pair: Pair) -> Decoder:
        """Return the decoder of these settings."""
        return CascadeEngine(pair, cls(settings))

    def begin(self, generator: torch.Generator) -> None:
        """Start a new text."""
        self._generator = generator
        self._num_written = 0

    def next(self) -> Span:
        """Return the lead of a new sentence, or the rest of one."""
        sentence = self.settings.unit
        if not self._num_written and self._leads():
            return Span(Writer.LARGE, Unit(self.settings.lead_tokens, sentence.marks))
        return Span(Writer.SMALL, sentence, self._num_written)

    def observe(self, written: Written) -> None:
        """Count the tokens of a sentence that goes on."""
        self._num_written = 0 if written.complete else self._num_written + len(written.tokens)

    def _leads(self) -> bool:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator)) < self.settings.rho
