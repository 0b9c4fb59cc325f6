"""The target's distributions after the nodes of a proposal, each computed when a verdict needs it.

N = nodes, V = vocabulary
"""

from __future__ import annotations

from torch import Tensor

from drafttrain.core.probability import likeliest, sampling_probs, without_padding
from drafttrain.core.texts import Sampling


class TargetProbs:
    """Rows are computed one by one on a CPU, where most nodes of a tree are never read, and all at once on other devices.

    Args:
        logits_NV: The target's logits after every node.
        num_tokens: Ids from here on are padding, which gets no probability.
    """

    def __init__(self, logits_NV: Tensor, sampling: Sampling, *, num_tokens: int) -> None:
        self._logits_NV = logits_NV
        self._sampling = sampling
        self._num_tokens = num_tokens
        self._rows: dict[int, Tensor] = {}
        self.computed_NV = None if logits_NV.device.type == "cpu" else self._probs(logits_NV)
        """All rows, if they are computed."""

    @classmethod
    def of(cls, probs_NV: Tensor) -> TargetProbs:
        """Return distributions that are known."""
        known = cls(probs_NV, Sampling(temperature=1.0), num_tokens=probs_NV.shape[-1])
        known.computed_NV = probs_NV
        return known

    def row(self, node: int) -> Tensor:
        """Return probs_V after a node."""
        if self.computed_NV is not None:
            return self.computed_NV[node]
        if node not in self._rows:
            self._rows[node] = self._probs(self._logits_NV[node : node + 1])[0]
        return self._rows[node]

    def only_token(self, node: int) -> int | None:
        """Return the token that is drawn with certainty, so that its row is not needed; None: draw from the row."""
        if self.computed_NV is not None or self._sampling.temperature > 0:
            return None
        return int(likeliest(self._without_padding(self._logits_NV[node : node + 1])))

    def whole(self) -> Tensor:
        """Return probs_NV, all rows."""
        return self._probs(self._logits_NV) if self.computed_NV is None else self.computed_NV

    def log_probs_at_one(self) -> Tensor:
        """Return log_probs_NV at temperature 1 without top-k and top-p, whatever the sampling: one-hot rows know no distance."""
        if self._sampling == Sampling(temperature=1.0):
            return self.whole().double().log()
        return self._without_padding(self._logits_NV).double().log_softmax(dim=-1)

    def _probs(self, logits_NV: Tensor) -> Tensor:
        return sampling_probs(self._without_padding(logits_NV), self._sampling)

    def _without_padding(self, logits_NV: Tensor) -> Tensor:
        return without_padding(logits_NV, num_tokens=self._num_tokens)
