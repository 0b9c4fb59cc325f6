"""Committed text that a drafter has not read yet: the target's features of it.

B = sequences, N = slots of one call (the longest sequence's), F = width of the target features
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.proposals import Context
from drafttrain.core.target_rows import TargetOutput


class UnreadText:
    """By sequence, the features of committed slots that are in no cache. A slot can be read once the token after it is known.

    Args:
        features: Returns features_BTF of the target's outputs.
    """

    def __init__(self, features: Callable[[TargetOutput], Tensor]) -> None:
        self._features = features
        self._pieces: list[list[Tensor]] = []

    @property
    def sizes(self) -> list[int]:
        """Unread slots of each sequence."""
        return [sum(len(piece) for piece in pieces) for pieces in self._pieces]

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start with prompts. The target has not read their last tokens."""
        self._pieces = [[] for _ in contexts]
        self.add(seen, [len(context.tokens) - 1 for context in contexts])

    def add(self, seen: Sequence[TargetOutput], sizes: Sequence[int]) -> None:
        """Append the first `size` slots of the target's outputs of each sequence."""
        for pieces, output, size in zip(self._pieces, seen, sizes, strict=True):
            if size:
                pieces.append(self._features(output)[0, :size])

    def take(
        self, contexts: Sequence[Context], *, starts: Sequence[int], sizes: Sequence[int]
    ) -> tuple[list[list[int]], Tensor]:
        """Remove the first `size` slots of each sequence; return (the token after each slot by sequence, features_BNF).

        Args:
            starts: The slots that each sequence has in the cache.
        """
        tokens = [
            context.tokens[start + 1 : start + 1 + size]
            for context, start, size in zip(contexts, starts, sizes, strict=True)
        ]
        wholes = [torch.cat(pieces) if size else None for pieces, size in zip(self._pieces, sizes, strict=True)]
        for row, (whole_NF, size) in enumerate(zip(wholes, sizes, strict=True)):
            if whole_NF is not None:
                self._pieces[row] = [whole_NF[size:]] if len(whole_NF) > size else []
        some_NF = next(whole_NF for whole_NF in wholes if whole_NF is not None)
        first = [
            some_NF[:0] if whole_NF is None else whole_NF[:size] for whole_NF, size in zip(wholes, sizes, strict=True)
        ]
        return tokens, pad_sequence(first, batch_first=True)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._pieces = [self._pieces[i] for i in keep]
