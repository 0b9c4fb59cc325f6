"""SpecReason: the small model writes steps, the large one scores each, and writes those again that it finds bad. LOSSY."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from drafttrain.core.settings import setting
from drafttrain.eval.cascade import cascades, span_judges
from drafttrain.eval.cascade.boundary import STEP
from drafttrain.eval.cascade.engine import CascadeEngine
from drafttrain.eval.cascade.judges import SpanJudge
from drafttrain.eval.cascade.judges.digit import DigitSettings
from drafttrain.eval.cascade.router import CascadeSettings, Decoder, Pair, Router
from drafttrain.eval.cascade.spans import Span, Unit, Writer, Written
from drafttrain.eval.cascade.text_reader import TextReader


@dataclass
class SpecReasonSettings(CascadeSettings):
    """Let the large model score the small one's steps."""

    threshold: float = setting(
        7.0, help="A step with at least this score, from 0 to 9, stays. 0: all stay; above 9: none.", ge=0
    )
    judge: Any = setting(DigitSettings(), help="How a step is scored, by kind.", registry=span_judges)
    marks: list[str] = setting(list(STEP), help="A step ends with the token that completes one of these texts.")
    step_tokens: int = setting(512, help="Tokens of a step at most.", ge=1)
    first_by_large: int = setting(0, help="Steps at the beginning that the large model writes.", ge=0)

    swept: ClassVar[str] = "threshold"
    values: ClassVar[Sequence[float]] = (1.0, 3.0, 5.0, 7.0, 9.0)

    @property
    def unit(self) -> Unit:
        """A step."""
        return Unit(self.step_tokens, tuple(self.marks))


@cascades.register("spec_reason", SpecReasonSettings)
class SpecReason(Router):
    """A step that stays has cost the large model one call, which reads it. `cascade.draft` adds drafts to the steps that it writes.

    Source: Pan et al. 2025, SpecReason, arXiv 2504.07891.
    """

    def __init__(self, settings: SpecReasonSettings, tokenizer: Any) -> None:
        self.settings = settings
        self._judge: SpanJudge = span_judges.build(settings.judge, tokenizer)

    @classmethod
    def create(cls, settings: SpecReasonSettings, pair: Pair) -> Decoder:
        """Return the decoder of these settings."""
        return CascadeEngine(pair, cls(settings, pair.target.tokenizer))

    def begin(self, generator: torch.Generator) -> None:
        """Start a new text."""
        self._num_steps = 0

    def next(self) -> Span:
        """Return the next step."""
        by_large = self._num_steps < self.settings.first_by_large
        return Span(Writer.LARGE if by_large else Writer.SMALL, self.settings.unit)

    def judged(self, written: Written, large: TextReader) -> float:
        """Return the score of a step."""
        return self._judge.score(written, large)

    def stays(self, score: float) -> bool:
        """Return whether the score reaches the threshold."""
        return score >= self.settings.threshold

    def observe(self, written: Written) -> None:
        """Count the steps."""
        self._num_steps += 1
