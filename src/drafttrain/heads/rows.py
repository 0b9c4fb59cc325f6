"""Labelled draft tokens, which heads are trained on.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class HeadRows:
    """Draft tokens: a hidden state of the frozen model for each, and a label from 0 (reject) to 1 (accept)."""

    features_ND: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class HeadBatch:
    """A micro-batch of labelled draft tokens."""

    rows: HeadRows
    weight_of_step: float
    """Sum of the rows' weights over all micro-batches of this optimizer step on all ranks."""
    step: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of draft tokens."""
        return len(self.rows)

    def each(self, change: Callable[[Tensor], Tensor]) -> HeadBatch:
        """Return the batch with every tensor changed: moved or pinned."""
        return replace(self, rows=HeadRows(change(self.rows.features_ND), change(self.rows.labels_N)))

    def to(self, device: Any) -> HeadBatch:
        """Return the batch on `device`."""
        return self.each(lambda tensor: tensor.to(device))
