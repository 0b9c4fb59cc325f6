"""The keys and values of the layer, for sequences of different lengths: committed slots, and the draft tokens of one round.

B = sequences, C = columns of committed slots, N = new slots of one call, P = columns of draft tokens, G = key-value heads,
d = width of a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


class EagleCache:
    """Committed slots come from the target's own features and stay; draft tokens stand after them for one round."""

    def __init__(self, num_sequences: int) -> None:
        self.lengths = [0] * num_sequences
        """Committed slots by sequence; each sequence fills the columns from the left."""
        self._committed: list[Tensor] = []
        """[keys_BGCd, values_BGCd]; empty before the first call."""
        self._drafts: list[Tensor] = []
        """[keys_BGPd, values_BGPd]; empty while nothing is drafted."""

    @property
    def num_draft_columns(self) -> int:
        """Columns of draft tokens, including padding."""
        return self._drafts[0].shape[2] if self._drafts else 0

    def commit(self, key_BGNd: Tensor, value_BGNd: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Append the first `size` new slots of every sequence; return all columns."""
        new = [key_BGNd, value_BGNd]
        if not self._committed:
            self._committed = [states.new_zeros(*states.shape[:2], 0, states.shape[3]) for states in new]
        width = max(length + size for length, size in zip(self.lengths, sizes, strict=True))
        grown = [pad(old, (0, 0, 0, max(0, width - old.shape[2]))) for old in self._committed]
        for row, (length, size) in enumerate(zip(self.lengths, sizes, strict=True)):
            for columns, states in zip(grown, new, strict=True):
                columns[row, :, length : length + size] = states[row, :, :size]
        self._committed = grown
        self.lengths = [length + size for length, size in zip(self.lengths, sizes, strict=True)]
        return grown[0], grown[1]

    def add_drafts(self, key_BGNd: Tensor, value_BGNd: Tensor) -> tuple[Tensor, Tensor]:
        """Append the draft tokens of one call; return all columns, committed ones first."""
        new = [key_BGNd, value_BGNd]
        old = self._drafts or [states[:, :, :0] for states in new]
        self._drafts = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self._committed, self._drafts, strict=True))
        return keys, values

    def forget_drafts(self) -> None:
        """Drop all draft tokens."""
        self._drafts = []

    def committed_before(self, starts: Sequence[int], *, width: int) -> Tensor:
        """Return allowed_BNC: for each of `width` slots from `starts` on, the columns up to and including the slot."""
        columns = self._committed[0].shape[2] if self._committed else 0
        last_BN = torch.tensor(list(starts))[:, None] + torch.arange(width)
        return torch.arange(columns) <= last_BN[:, :, None]

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        assert not self._drafts, "drop the draft tokens before the sequences"
        self.lengths = [self.lengths[i] for i in sequences]
        width = max(self.lengths, default=0)
        rows_B = torch.tensor(list(sequences), dtype=torch.long)
        self._committed = [states[rows_B.to(states.device), :, :width] for states in self._committed]

    def bytes_per_slot(self) -> int:
        """Return the bytes of one slot of one sequence; 0 before the first call."""
        return sum(states.shape[1] * states.shape[3] * states.element_size() for states in self._committed)
