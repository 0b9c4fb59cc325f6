"""Counts of which token follows the last few tokens, of a corpus and of a text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drafttrain.core.settings import setting
from drafttrain.data_gen.plain_ids import plain_ids

Counts = dict[tuple[int, ...], dict[int, float]]


@dataclass
class CorpusSettings:
    """Base of the settings of proposers that may count a corpus first."""

    corpus: str | None = setting(
        None, help="A text file that is counted before; null: only the text so far is counted."
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.corpus is not None and not Path(self.corpus).expanduser().is_file():
            return [f"corpus: {self.corpus}: no such file"]
        return []

    def corpus_tokens(self, tokenizer: Any) -> Sequence[int]:
        """Return the corpus in a tokenizer's ids; none without a corpus."""
        return plain_ids(tokenizer, Path(self.corpus).expanduser().read_text(encoding="utf-8")) if self.corpus else []


@dataclass
class NgramCounts:
    """How often each token followed one token, two tokens, and so on."""

    longest: int = 2
    """Tokens of the longest context that is counted."""
    following: Counts = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    """By context, the counts of the tokens after it."""
    total: dict[tuple[int, ...], float] = field(default_factory=lambda: defaultdict(float))
    """By context, the sum of these counts."""

    def add(self, tokens: Sequence[int], *, start: int = 0, weight: float = 1.0) -> None:
        """Count the tokens from `start` on, each after every context before it."""
        for end in range(max(start, 1), len(tokens)):
            for size in range(1, min(end, self.longest) + 1):
                context = tuple(tokens[end - size : end])
                self.following[context][tokens[end]] += weight
                self.total[context] += weight


def share_after(parts: Sequence[NgramCounts], context: tuple[int, ...], token: int) -> float:
    """Return the share of a token among those that followed a context, all parts together; 0: the context is not known."""
    total = sum(part.total.get(context, 0.0) for part in parts)
    return sum(part.following[context].get(token, 0.0) for part in parts if context in part.total) / (total or 1.0)
