"""The texts of a batch read a second time with other tokens in some places, as a drafter is trained on them.

B = sequences, T = positions, N = slots whose states are trained
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Alteration:
    """One text, read a second time."""

    text: Sequence[int]
    """The record's tokens; a few labels may be replaced."""
    read: Sequence[int]
    """What is read in their place."""
    places: Sequence[int]
    """Positions whose states are trained."""
    weight: float | None = None
    """Of the loss at each of them, a label of the text being 1; None: those of the text add up to its number of labels."""


@dataclass(frozen=True)
class AlteredText:
    """The texts of a batch, in the same slots, read a second time."""

    tokens_BT: Tensor
    slots_N: Tensor
    """Flat slots b * T + t whose states are trained."""
    weights_N: Tensor
    """Of their losses, a label of the text being 1."""

    def each(self, change: Callable[[Tensor], Tensor]) -> AlteredText:
        """Return a copy with changed tensors: moved, pinned."""
        return AlteredText(change(self.tokens_BT), change(self.slots_N), change(self.weights_N))

    def as_padding(self) -> AlteredText:
        """Return the same texts, of which nothing is trained."""
        return AlteredText(self.tokens_BT, self.slots_N[:0], self.weights_N[:0])


def packed_alterations(
    tokens_BT: Tensor, at: Sequence[tuple[int, int]], alterations: Sequence[Alteration], num_labels: Sequence[int]
) -> AlteredText:
    """Return the altered texts of a batch.

    Args:
        tokens_BT: Of the batch.
        at: For each record the (row, column) where it begins.
        num_labels: By record.
    """
    import torch

    read_BT = tokens_BT.clone()
    slots: list[int] = []
    weights: list[float] = []
    for (row, column), one, labels in zip(at, alterations, num_labels, strict=True):
        read_BT[row, column : column + len(one.read)] = torch.tensor(one.read)
        begins = row * tokens_BT.shape[1] + column
        slots += [begins + place for place in one.places]
        weights += [labels / len(one.places) if one.weight is None else one.weight for _ in one.places]
    order = sorted(range(len(slots)), key=lambda i: slots[i])
    return AlteredText(
        read_BT,
        torch.tensor([slots[i] for i in order], dtype=torch.long),
        torch.tensor([weights[i] for i in order], dtype=torch.float32),
    )
