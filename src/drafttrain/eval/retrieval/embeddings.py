"""Embeddings: chunks whose meaning is near that of the query, by a sentence encoder.

B = texts of a call, T = positions, D = width of the encoder, C = chunks
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from drafttrain.core.errors import CheckpointError
from drafttrain.core.settings import setting
from drafttrain.eval.retrieval import retrievers
from drafttrain.target_model import Target
from drafttrain.target_model.folder_checks import in_one_line
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.tokenizer import load_tokenizer

BATCH = 32
"""Texts that are encoded together."""


@dataclass
class EmbeddingsSettings:
    """Chunks whose meaning is near that of the query, by a sentence encoder."""

    model: str = setting("", help="Folder or hub id of the encoder, for instance BAAI/bge-m3.")
    min_similarity: float = setting(0.3, help="Least cosine of a chunk that is retrieved.", ge=-1, le=1)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        return [] if self.model else ["model: the encoder's folder or hub id is needed"]


@retrievers.register("embeddings", EmbeddingsSettings)
class Embeddings:
    """Cosines of the encoder's states: of its first token or their mean, as its folder says in 1_Pooling/config.json.

    Raises:
        CheckpointError: The folder is not that of an encoder.
    """

    def __init__(self, settings: EmbeddingsSettings, target: Target) -> None:
        from transformers import AutoModel  # slow to import

        folder = resolve_folder(settings.model)
        self._least = settings.min_similarity
        self._text = target.tokenizer
        self._tokenizer = load_tokenizer(folder)
        try:
            self._model = AutoModel.from_pretrained(folder).eval().to(target.device)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"retriever embeddings: model: {folder}: {in_one_line(error)}") from error
        self._first_only = _reads_first_only(folder)

    def scores(self, chunks: Sequence[Sequence[int]], query: Sequence[int]) -> list[float]:
        """Return the cosine of each chunk; -inf: it is too small."""
        embedded_CD = self.embedded([self._text.decode(list(one)) for one in (query, *chunks)])
        cosines = (embedded_CD[1:] @ embedded_CD[0]).tolist()
        return [one if one >= self._least else -math.inf for one in cosines]

    @torch.no_grad()
    def embedded(self, texts: Sequence[str]) -> Tensor:
        """Return embedded_BD of texts, of length 1."""
        found = []
        for start in range(0, len(texts), BATCH):
            read = self._tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt"
            ).to(self._model.device)
            states_BTD = self._model(**read).last_hidden_state
            mask_BT1 = read["attention_mask"][:, :, None].to(states_BTD.dtype)
            mean_BD = (states_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
            found.append(normalize(states_BTD[:, 0] if self._first_only else mean_BD, dim=-1))
        return torch.cat(found)


def _reads_first_only(folder: Path) -> bool:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8")).get("pooling_mode_cls_token"))
