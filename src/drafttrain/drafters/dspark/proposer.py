"""The proposer of DSpark: the walk, with the predicted acceptance of each token before it is drawn.

M = chains that grow (or nodes of all trees' frontiers), D = hidden, e = rank
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from drafttrain.drafters.dflash.walk_proposer import WalkedModel, WalkProposer
from drafttrain.drafters.dspark.markov import ConfidenceHead


class DSparkModel(WalkedModel, Protocol):
    """What drafting needs beside the walk."""

    confidence_head: ConfidenceHead | None
    temperatures: Sequence[float]


class DSparkProposer(WalkProposer):
    """The walk, with the confidence head if there is one."""

    def __init__(self, model: DSparkModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._confidence = model.confidence_head
        self._temperatures = model.temperatures

    def confidence(self, place: int, hidden_MD: Tensor, embedded_Me: Tensor) -> Tensor | None:
        """Return confidence_M of a slot's tokens, calibrated."""
        if self._confidence is None:
            return None
        scores_M: Tensor = self._confidence(hidden_MD, embedded_Me) / self._temperatures[place]
        return scores_M
