"""Keys and values of one layer in preallocated memory: a call writes its columns in place, and concatenates nothing.

B = sequences, C = columns, N = columns of one call, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 128
"""Memory is allocated in multiples of this many columns."""


class KeysAndValues:
    """Keys and values by column. The caller knows which columns are in use, and masks the others.

    Columns that were never written are 0: a masked column has weight 0, but 0 times a NaN would be NaN.
    """

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        """[keys_BGCd, values_BGCd]; empty before the first call."""

    def reserve(self, columns: int, *, like: Sequence[Tensor]) -> None:
        """Allocate at least this many columns for keys and values of these shapes; the others keep their contents."""
        old = self._states or [states.new_zeros(*states.shape[:2], 0, states.shape[3]) for states in like]
        allocated = old[0].shape[2]
        if columns <= allocated:
            return
        # By an eighth at least: a long text is then copied a few times only.
        room = -(-max(columns, allocated + allocated // 8) // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
        self._states = [states.new_zeros(*states.shape[:2], room, states.shape[3]) for states in old]
        for grown, states in zip(self._states, old, strict=True):
            grown[:, :, :allocated] = states

    def write(self, start: int, *new: Tensor, row: int | None = None) -> None:
        """Write [keys_BGNd, values_BGNd] from column `start` on, of all sequences or of one."""
        for states, columns in zip(self._states, new, strict=True):
            place = states if row is None else states.narrow(0, row, 1)
            place.narrow(2, start, columns.shape[2]).copy_(columns)

    def write_at(self, columns_BN: Tensor, *new: Tensor) -> None:
        """Write [keys_BGNd, values_BGNd] to these columns of each sequence."""
        rows_B1 = torch.arange(len(columns_BN), device=columns_BN.device)[:, None]
        for states, columns in zip(self._states, new, strict=True):
            states.transpose(1, 2)[rows_B1, columns_BN] = columns.transpose(1, 2)

    def move(self, columns_BN: Tensor, *, first: int) -> None:
        """Copy each sequence's columns `columns_BN` to its columns `first`, `first` + 1, ..."""
        for states in self._states:
            index = columns_BN[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            states.narrow(2, first, columns_BN.shape[1]).copy_(states.gather(2, index))

    def first(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return (keys_BGCd, values_BGCd) of the first columns."""
        keys, values = self._states
        return keys.narrow(2, 0, columns), values.narrow(2, 0, columns)

    def select(self, sequences: Sequence[int], *, width: int) -> None:
        """Keep only these sequences, in this order, and their first columns."""
        rows_B = torch.tensor(list(sequences), dtype=torch.long)
        self._states = [states[rows_B.to(states.device), :, :width] for states in self._states]

    def bytes_per_column(self) -> int:
        """Return the bytes of one column of one sequence; 0 before the first call."""
        return sum(states.shape[1] * states.shape[3] * states.element_size() for states in self._states)
