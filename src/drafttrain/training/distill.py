"""The training step of distillation: one micro-batch from the frozen target to the loss that is differentiated.

B = sequences, T = positions, N = trained positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.distributed.collectives import sums_over_processes
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.target_model import Target
from drafttrain.target_model.logits import LiveRows
from drafttrain.training.flops import distill_flops
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_module import StepModule
from drafttrain.training.target_outputs import missing, with_target

OF_DRAWS = ("drawn_share", "drawn_tokens")
"""Columns of metrics.csv at the step of the row: share of the records that the drafter in training wrote, their mean number of labels."""


class DistillModule(StepModule):
    """Trains a drafter against a frozen target.

    Args:
        target: None when neither the drafter nor the loss needs one, or when batches bring cached rows.
        vocab_size: Ids that target, drafter and tokenizer share; logits are cut to these.
        draws: The drafter in training writes a part of the records; metrics.csv then has figures of these.
    """

    trained: Drafter

    def __init__(
        self,
        drafter: Drafter,
        loss: Loss,
        *,
        target: Target | None,
        settings: TrainSettings,
        vocab_size: int,
        draws: bool = False,
    ) -> None:
        super().__init__(drafter, settings=settings)
        self.loss = loss
        self.vocab_size = vocab_size
        # No submodule: it must never enter a checkpoint.
        self.target = target
        self.draws = draws

    def training_step(self, batch: DraftBatch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, scaled so that the gradients of a step add up to the mean over its positions."""
        batch = self._with_target(batch.restored())
        self.clock.enter("forward")
        made = batch_loss(
            self.trained,
            self.loss,
            batch,
            vocab_size=self.vocab_size,
            chunk_rows=self.settings.loss_chunk_rows,
            measured=self.writes_a_row(),
        )
        if self.writes_a_row():
            self.count_figures({**made.figures, **self._of_draws(batch)})
        acceptance = () if made.acceptance_N is None else (made.acceptance_N.sum(), len(made.acceptance_N))
        self.count(made.total, len(made.loss_N), *acceptance)
        return self.scaled(made.total, batch)

    def planned(self, batch: DraftBatch) -> DraftBatch:
        """Return a micro-batch with the length of the training, and the rows that the loss and the drafter will ask for."""
        if self.target is not None and (unread := missing(self.trained, self.loss, batch)) is not None:
            self.target.read_ahead(batch.tokens_BT, batch.positions_BT, unread)
        return with_plan(self.trained, self.loss, replace(batch, num_steps=self.settings.max_steps))

    def _with_target(self, batch: DraftBatch) -> DraftBatch:
        unread = missing(self.trained, self.loss, batch)
        reads = unread is not None
        head = self.loss.reads_target(batch.step) and (
            batch.target_rows is None or isinstance(batch.target_rows, LiveRows)
        )
        blocks = reads and self.target is not None and not self.target.elsewhere
        self.count_later(partial(distill_flops, self.trained, self.target, batch.shape, reads=blocks, head=head))
        if not self._read_by_any(reads):
            return batch
        assert self.target is not None, "the pipeline loads a target when the drafter or the loss needs one"
        read = with_target(batch, self.target, unread or self.trained.needs(), self.loss)
        return read if reads else batch

    def _read_by_any(self, reads: bool) -> bool:
        """Return whether this process runs the target; all processes run a sharded target if one of them needs it."""
        if self.target is None or not self.target.sharded:
            return reads
        return sums_over_processes([reads])[0] > 0

    @property
    def figure_names(self) -> Sequence[str]:
        """Those that the drafter names, and those of the answers that it writes itself."""
        return [*self.trained.figures, *(OF_DRAWS if self.draws else ())]

    def _of_draws(self, batch: DraftBatch) -> dict[str, tuple[Tensor, int]]:
        share, length = OF_DRAWS
        drawn = [number for number in batch.drawn_tokens if number]
        sums_2 = torch.tensor([len(drawn), sum(drawn)])
        return {share: (sums_2[0], len(batch.drawn_tokens)), length: (sums_2[1], len(drawn))} if self.draws else {}

    def end_of_step(self) -> None:
        """Let the loss update the state that it carries from step to step."""
        self.loss.end_of_step()
