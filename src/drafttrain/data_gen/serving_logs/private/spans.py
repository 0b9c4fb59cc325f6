"""Spans of private content, and a text with placeholders in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

PLACEHOLDER = re.compile(r"\[(?:key|e-mail|phone|card|iban|id|ip)\]")


class Span(NamedTuple):
    """A range of private characters."""

    start: int
    stop: int
    kind: str


def replaced(text: str, spans: Iterable[Span]) -> str:
    """Return a text with a placeholder for each span; overlapping spans are merged and get the kind of the first."""
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
