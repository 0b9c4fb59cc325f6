"""Judges of spans, one file each: how the large model scores what the small one wrote, from 0 to 9."""

from typing import Any, Protocol

from drafttrain.eval.cascade.spans import Written
from drafttrain.eval.cascade.text_reader import TextReader

HIGHEST = 9.0


class SpanJudge(Protocol):
    """Scores a span of the small model."""

    def __init__(self, settings: Any, tokenizer: Any) -> None: ...

    def score(self, written: Written, large: TextReader) -> float:
        """Return a score from 0 to 9. The text ends with the span; the large model may not have read it yet."""
        ...
