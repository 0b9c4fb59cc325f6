"""Losses, one file each. A loss returns one value a row, float32, unreduced; the caller sums, counts and divides once."""

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.registry import Registry
from drafttrain.core.target_rows import RowIndex

losses = Registry("loss", "drafttrain.losses")


class Loss(nn.Module, ABC):
    """A loss in two moves, so that no loss ever needs a logits tensor of all rows at once.

    `per_row` looks at one row at a time and runs in chunks straight from hidden states; `combine` sees the few numbers
    that `per_row` left of every row. A pointwise loss is one whose `combine` only picks `loss`. State that is carried
    from step to step is a buffer, so it travels in checkpoints.
    """

    needs_target: ClassVar[bool] = True

    @property
    def block_length(self) -> int:
        """Rows of a drafter of depth 1 that form one block."""
        return 1

    @property
    def pointwise(self) -> bool:
        """Whether `combine` may be called with some of the rows at a time: it looks at one row alone, or adds up what it saw."""
        return type(self).combine is Loss.combine

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return named values, each float32 of shape N, differentiable in the drafter's logits."""
        raise NotImplementedError

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return loss_N of all rows of a micro-batch.

        Rows that are not in `index.learnable_N` get the loss 0 afterwards; a mean over rows leaves them out by itself.
        """
        return values["loss"]

    def end_of_step(self) -> None:
        """Move what was gathered over the micro-batches of an optimiser step into the carried state."""
