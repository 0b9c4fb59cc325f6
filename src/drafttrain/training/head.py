"""The training step of a head: one micro-batch of labelled draft tokens.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from drafttrain.heads import TokenHead
from drafttrain.heads.rows import HeadBatch
from drafttrain.training.flops import head_flops
from drafttrain.training.step_module import StepModule


class HeadModule(StepModule):
    """Trains a head on labelled draft tokens."""

    trained: TokenHead

    def training_step(self, batch: HeadBatch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch: a sum over rows, divided by the weights of all rows of the step."""
        self.clock.enter("forward")
        self.count_later(partial(head_flops, self.trained, len(batch.rows)))
        labels_N = batch.rows.labels_N
        loss_N = self.trained.loss(self.trained(batch.rows.features_ND), labels_N)
        weight = self.trained.weights(labels_N).sum()
        self.count(loss_N.detach().sum(), weight)
        return self.scaled(loss_N.sum(), batch)
