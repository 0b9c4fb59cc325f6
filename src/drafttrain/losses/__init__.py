"""Losses, one file each. A loss returns one value for each row, float32, unreduced; the caller sums, counts and divides once."""

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.registry import Registry
from drafttrain.core.target_rows import RowIndex

losses = Registry("loss", "drafttrain.losses")


class Loss(nn.Module, ABC):
    """A loss in two steps, so that the logits of all rows never exist at once.

    `per_row` computes a few numbers for each row, and runs in chunks from hidden states; `combine` sees these numbers of all
    rows. The `combine` of a pointwise loss only picks `loss`. State that is carried from step to step is a buffer, so that
    checkpoints store it.
    """

    needs_target: ClassVar[bool] = True

    @property
    def block_length(self) -> int:
        """Rows of a drafter of depth 1 that form one block."""
        return 1

    @property
    def pointwise(self) -> bool:
        """Whether `combine` may be called with a part of the rows: it reads one row at a time, or accumulates sums."""
        return type(self).combine is Loss.combine

    @property
    def runs_without_target(self) -> bool:
        """Whether `per_row` may be called without the target's logits, where `reads_target` is False."""
        return not self.needs_target

    def reads_target(self, step: int) -> bool:
        """Return whether an optimizer step, from 0, reads the target's logits: a schedule may end that."""
        return self.needs_target

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return named values, each float32 of shape N, differentiable in the drafter's logits."""
        raise NotImplementedError

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return loss_N of all rows of a micro-batch.

        Rows that are not in `index.learnable_N` get the loss 0 afterwards; a mean over rows must leave them out itself.
        """
        return values["loss"]

    def figures(self) -> Mapping[str, tuple[Tensor, int]]:
        """Return further figures of the rows that `combine` saw last: (sum over rows, rows) by name.

        A loss that is trained beside a drafter's drafts has them in the log, if the drafter names them.
        """
        return {}

    def end_of_step(self) -> None:
        """Update the carried state from the micro-batches of an optimizer step."""
