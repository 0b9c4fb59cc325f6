"""Retrievers, one file each: which parts of a long text belong to its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from drafttrain.core.registry import Registry

retrievers = Registry("retriever", "drafttrain.eval.retrieval")


class Retriever(Protocol):
    """Scores chunks of a text by a query, both in the target's tokens. It is made from its settings and the target."""

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        """Return the score of each chunk; -inf: it has nothing to do with the query, and is not retrieved."""
        ...
