"""The target's distribution at chosen rows, computed from its final states.

B = sequences, T = positions, V = vocabulary, D = hidden, N = rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drafttrain.target_model.logits import head_logits


class LiveRows:
    """The target's distribution from its final states. The head runs only on the requested rows."""

    def __init__(self, model: Any, final_BTD: Tensor) -> None:
        self._model = model
        self._final_BTD = final_BTD

    def each(self, change: Callable[[Tensor], Tensor]) -> LiveRows:
        """Return a copy with changed tensors: moved, pinned."""
        return LiveRows(self._model, change(self._final_BTD))

    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV of the token after each flat position."""
        with torch.no_grad():
            final_RD = self._final_BTD.flatten(0, 1)
            final_ND = final_RD.index_select(0, index_N.to(final_RD.device))
            # Cached states may have another type than the head.
            return head_logits(self._model, final_ND.to(self._model.dtype)).to(index_N.device)
