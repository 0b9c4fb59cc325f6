"""Places in a text, and the text without them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

PLACEHOLDER = re.compile(r"\[(?:key|e-mail|phone|card|iban|id|ip)\]")


class Span(NamedTuple):
    """Characters that must not be kept."""

    start: int
    stop: int
    kind: str


def replaced(text: str, spans: Iterable[Span]) -> str:
    """Return a text with a placeholder for each span; of spans that overlap, one that covers all of them has the first one's kind."""
    parts: list[str] = []
    end = 0
    kind = ""
    for span in sorted(spans, key=lambda span: (span.start, -span.stop)):
        if span.start < end:
            end = max(end, span.stop)
            continue
        parts += [f"[{kind}]" if kind else "", text[end : span.start]]
        end, kind = span.stop, span.kind
    return "".join([*parts, f"[{kind}]" if kind else "", text[end:]])
