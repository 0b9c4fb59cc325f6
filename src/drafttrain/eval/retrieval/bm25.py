"""BM25: chunks that share rare tokens with the query."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.errors import CheckpointError
from drafttrain.core.settings import setting
from drafttrain.eval.retrieval import retrievers
from drafttrain.target_model import Target

NOT_INSTALLED = "retriever bm25 needs the library bm25s: pip install 'drafttrain[retrieval]', or use {kind: embeddings, model: FOLDER}"


@dataclass
class Bm25Settings:
    """Chunks that share rare tokens with the query. Needs `pip install 'drafttrain[retrieval]'`."""

    k1: float = setting(1.5, help="How much a token counts that occurs again in a chunk.", ge=0)
    b: float = setting(0.75, help="How much longer chunks count less.", ge=0, le=1)


@retrievers.register("bm25", Bm25Settings)
class Bm25:
    """Terms are the target's tokens, so no language needs a splitter of its own. Scores are those of the library bm25s.

    Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond; the variant is Lucene's.

    Raises:
        CheckpointError: bm25s is not installed.
    """

    def __init__(self, settings: Bm25Settings, target: Target) -> None:
        self._settings = settings
        try:
            self._library = importlib.import_module("bm25s")
        except ImportError as error:
            raise CheckpointError(NOT_INSTALLED) from error

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        """Return the score of each chunk; -inf: it shares no token with the query."""
        index = self._library.BM25(k1=self._settings.k1, b=self._settings.b, method="lucene")
        index.index([[str(token) for token in chunk] for chunk in chunks], show_progress=False)
        found = index.get_scores([str(token) for token in query]).tolist()
        return [score if score > 0 else -math.inf for score in found]
