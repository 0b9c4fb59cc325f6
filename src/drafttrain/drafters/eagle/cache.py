"""The keys and values of the layer, for sequences of different lengths: committed slots, and the draft tokens of one round.

B = sequences, C = columns of committed slots, N = new slots of one call, P = columns of draft tokens, G = key-value heads,
d = width of a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.drafters.keys_and_values import KeysAndValues

Path = list[int]
"""The draft columns that a draft token attends to: those of its ancestors and its own."""


class EagleCache:
    """Committed slots come from the target's own features and stay; draft tokens stand after them for one round."""

    def __init__(self, num_sequences: int) -> None:
        self.lengths = [0] * num_sequences
        """Committed slots by sequence; each sequence fills the columns from the left."""
        self.num_draft_columns = 0
        """Columns of draft tokens, including padding. They follow the longest sequence."""
        self._columns = KeysAndValues()

    @property
    def width(self) -> int:
        """Columns of committed slots, including padding."""
        return max(self.lengths, default=0)

    @property
    def is_full(self) -> bool:
        """Whether every sequence fills all committed columns."""
        return min(self.lengths, default=0) == self.width

    def commit(self, key_BGNd: Tensor, value_BGNd: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Append the first `size` new slots of every sequence; return all columns."""
        starts = self.lengths
        self.lengths = [length + size for length, size in zip(starts, sizes, strict=True)]
        self._columns.reserve(self.width, like=(key_BGNd, value_BGNd))
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if size:
                new = (states[row : row + 1, :, :size] for states in (key_BGNd, value_BGNd))
                self._columns.write(start, *new, row=row)
        return self._columns.first(self.width)

    def add_drafts(self, key_BGNd: Tensor, value_BGNd: Tensor) -> tuple[Tensor, Tensor]:
        """Append the draft tokens of one call; return all columns, committed ones first."""
        first = self.width + self.num_draft_columns
        self.num_draft_columns += key_BGNd.shape[2]
        self._columns.reserve(self.width + self.num_draft_columns, like=(key_BGNd, value_BGNd))
        self._columns.write(first, key_BGNd, value_BGNd)
        return self._columns.first(self.width + self.num_draft_columns)

    def forget_drafts(self) -> None:
        """Drop all draft tokens."""
        self.num_draft_columns = 0

    def committed_before(self, starts: Sequence[int], *, width: int) -> Tensor:
        """Return allowed_BNC: for each of `width` slots from `starts` on, the columns up to and including the slot."""
        last_BN = torch.tensor(list(starts))[:, None] + torch.arange(width)
        return torch.arange(self.width) <= last_BN[:, :, None]

    def allowed_on_paths(self, paths: Sequence[Sequence[Path]], *, width: int) -> Tensor | None:
        """Return allowed_BNC: the committed slots of each sequence, and the path of each of its new draft tokens.

        None: each attends to all columns.

        Args:
            paths: Of the draft tokens of each sequence, at most `width`.
        """
        columns = self.num_draft_columns
        if self.is_full and all(len(of) == width and all(len(one) == columns for one in of) for of in paths):
            return None
        # Padding attends to the first draft column, because a softmax needs at least one. Nobody reads its output.
        padded = [[*of, *[[0]] * (width - len(of))] for of in paths]
        path_BNP = torch.tensor([[[column in one for column in range(columns)] for one in of] for of in padded])
        text_BNC = self.committed_before([length - 1 for length in self.lengths], width=1)
        return torch.cat([text_BNC.expand(-1, width, -1), path_BNP], dim=-1)

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        assert not self.num_draft_columns, "drop the draft tokens before the sequences"
        self.lengths = [self.lengths[i] for i in sequences]
        self._columns.select(sequences, width=self.width)

    def bytes_per_slot(self) -> int:
        """Return the bytes of one slot of one sequence; 0 before the first call."""
        return self._columns.bytes_per_column()
