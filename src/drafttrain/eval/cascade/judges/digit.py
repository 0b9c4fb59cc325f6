"""The judge of SpecReason: the large model is asked for a score, and one token decides.

V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.eval.cascade import span_judges
from drafttrain.eval.cascade.spans import Written
from drafttrain.eval.cascade.text_reader import TextReader

QUESTION = "\nScore of the last step, from 0 (wrong or useless) to 9 (right and helpful):"


@dataclass
class DigitSettings:
    """Ask the large model for a digit."""

    question: str = setting(
        QUESTION,
        help="Text behind the step, up to the digit; a chat model needs its turns in it, as its template has them.",
    )
    by: Literal["likeliest", "expected"] = setting(
        "likeliest", help="The score: the likeliest digit, or the expectation over the ten."
    )


@span_judges.register("digit", DigitSettings)
class Digit:
    """One call reads the step and the question; its row behind them decides. The question is dropped from the cache.

    Source: Pan et al. 2025, SpecReason, arXiv 2504.07891.
    """

    def __init__(self, settings: DigitSettings, tokenizer: Any) -> None:
        self.settings = settings
        self._tokenizer = tokenizer

    def score(self, written: Written, large: TextReader) -> float:
        """Return the digit, or its expectation."""
        log_probs_V = large.after(self.question).log_probs_at_one()[0]
        chances_10 = log_probs_V[list(self.digits)].softmax(dim=-1)
        if self.settings.by == "likeliest":
            return float(chances_10.argmax())
        return float(sum(digit * chance for digit, chance in enumerate(chances_10.tolist())))

    @cached_property
    def question(self) -> list[int]:
        """The tokens of the question."""
        return self._tokens(self.settings.question)

    @cached_property
    def digits(self) -> Sequence[int]:
        """The token of each digit behind the question.

        Raises:
            DataError: The tokenizer has no single token for a digit there.
        """
        for space in ("", " "):
            texts = [self._tokens(f"{self.settings.question}{space}{digit}") for digit in range(10)]
            if all(ids[:-1] == self.question for ids in texts) and len({ids[-1] for ids in texts}) == 10:
                return [ids[-1] for ids in texts]
        raise DataError(
            f"judge.question: {self.settings.question!r:.80}: the tokenizer writes no digit as one token behind it: end the question "
            "without a space, or with a line break"
        )

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
