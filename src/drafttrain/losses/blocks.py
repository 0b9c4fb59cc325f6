"""The rows of a micro-batch as blocks: a table with the successive depths of one draft in a row.

N = rows, B = blocks (at most N), K = depths of a block
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.target_rows import RowIndex
from drafttrain.losses.groups import groups

_BEYOND = 1 << 40
"""Larger than any depth."""


@dataclass(frozen=True)
class Blocks:
    """Where each row is in the table. Columns count from the first depth of the block that can be learned."""

    counted_N: Tensor
    """Whether the row can be learned. The others are holes."""
    block_N: Tensor
    column_N: Tensor
    columns: int

    @classmethod
    def of(cls, index: RowIndex) -> Blocks:
        """Find the blocks of rows, without waiting for the device."""
        counted_N = torch.ones_like(index.depth_N, dtype=torch.bool)
        if index.learnable_N is not None:
            counted_N = index.learnable_N
        block_N = groups(index.block_N)
        depth_N = torch.where(counted_N, index.depth_N, _BEYOND)
        first_B = torch.full_like(depth_N, _BEYOND).scatter_reduce(0, block_N, depth_N, "amin")
        column_N = (index.depth_N - first_B[block_N]).clamp_min(0)
        return cls(counted_N, block_N, column_N, index.deepest or int(index.depth_N.max()))

    def table(self, values_N: Tensor) -> Tensor:
        """Return values_BK, 0 in holes: a missing depth, or one that cannot be learned."""
        table_S = values_N.new_zeros(len(values_N) * self.columns)
        table_S = table_S.index_add(0, self._cell_N, values_N * self.counted_N.to(values_N.dtype))
        return table_S.view(-1, self.columns)

    def rows(self, values_BK: Tensor) -> Tensor:
        """Return the value at every row."""
        return values_BK.flatten()[self._cell_N]

    @property
    def _cell_N(self) -> Tensor:
        return self.block_N * self.columns + self.column_N
