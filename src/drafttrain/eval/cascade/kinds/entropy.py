"""Entropy Adaptive Decoding: the large model writes where the text is uncertain, by the rolling entropy of whoever writes. LOSSY."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from drafttrain.core.settings import setting
from drafttrain.eval.cascade import cascades
from drafttrain.eval.cascade.engine import CascadeEngine
from drafttrain.eval.cascade.router import CascadeSettings, Decoder, Pair, Router
from drafttrain.eval.cascade.spans import Span, Unit, Writer, Written


@dataclass
class EntropySettings(CascadeSettings):
    """Switch models by the rolling entropy of the one that writes."""

    threshold: float | None = setting(
        1.0,
        help="The large model writes where the rolling mean of the entropy, in bits, is at least this. 0: always; null: never.",
        ge=0,
    )
    window: int = setting(4, help="Tokens of the rolling mean.", ge=1)
    dwell: int = setting(4, help="Tokens that a model writes at least before the other one may.", ge=1)

    swept: ClassVar[str] = "threshold"
    drafts: ClassVar[bool] = False
    values: ClassVar[Sequence[float]] = (0.125, 0.25, 0.5, 1.0, 2.0)

    @property
    def unit(self) -> Unit:
        """The shortest stay of a writer."""
        return Unit(self.dwell)


@cascades.register("entropy", EntropySettings)
class Entropy(Router):
    """The entropy is that of the distribution at temperature 1 from which each token was written.

    Before the first token nothing is known: the mean counts as infinite, so the large model begins, unless it never writes.

    Source: Simonds 2025, Entropy Adaptive Decoding, arXiv 2502.06833. The beginning of a text is this project's choice.
    """

    reads_entropies: ClassVar[bool] = True

    def __init__(self, settings: EntropySettings) -> None:
        self.settings = settings

    @classmethod
    def create(cls, settings: EntropySettings, pair: Pair) -> Decoder:
        """Return the decoder of these settings."""
        return CascadeEngine(pair, cls(settings))

    def begin(self, generator: torch.Generator) -> None:
        """Start a new text."""
        self._recent: deque[float] = deque(maxlen=self.settings.window)
        self._stayed = 0
        self._writer = self._wanted()

    def next(self) -> Span:
        """Return the writer and the tokens until it may change."""
        if self._stayed >= self.settings.dwell and (wanted := self._wanted()) is not self._writer:
            self._writer, self._stayed = wanted, 0
        return Span(self._writer, Unit(max(1, self.settings.dwell - self._stayed)))

    def observe(self, written: Written) -> None:
        """Add the entropies of a span."""
        self._recent.extend(written.entropies)
        self._stayed += len(written.tokens)

    def _wanted(self) -> Writer:
        threshold = self.settings.threshold
        mean = sum(self._recent) / len(self._recent) if self._recent else math.inf
        return Writer.SMALL if threshold is None or mean < threshold else Writer.LARGE
