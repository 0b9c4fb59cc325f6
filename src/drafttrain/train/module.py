"""The training step: drafter (or head), loss, one division.

B = sequences, T = positions, V = vocabulary, N = trained positions
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from drafttrain.core.errors import DrafttrainError
from drafttrain.core.records import DraftBatch, TargetNeeds, TargetOutput
from drafttrain.drafters import Drafter
from drafttrain.heads import HeadBatch, TokenHead
from drafttrain.losses import Loss
from drafttrain.losses.align import align
from drafttrain.losses.chunked import normalised, row_losses
from drafttrain.target import Target
from drafttrain.train.optimizer import build_optimizer, learning_rate_scale
from drafttrain.train.settings import TrainSettings


class StepModule(LightningModule):
    """What all trainings share: counts, clipping, optimizer and schedule.

    Args:
        trained: The drafter or head; `save(folder)` writes it.
    """

    def __init__(self, trained: Any, *, settings: TrainSettings) -> None:
        super().__init__()
        self.trained = trained
        self.settings = settings
        self.sums_4 = torch.zeros(4, dtype=torch.float64)
        """Sums since the last log: loss, its positions; acceptance, its positions, of the steps that measure it."""
        self.grad_norm = 0.0

    def _scaled(self, total: Tensor, batch: DraftBatch | HeadBatch) -> Tensor:
        """Return a micro-batch's sum, scaled so that the gradients of a step add up to the mean over its positions."""
        return normalised(
            total, batch, world_size=self.trainer.world_size, accumulation=self.trainer.accumulate_grad_batches
        )

    def _count(self, *parts: Tensor) -> None:
        """Add to the sums, from the first on."""
        self.sums_4[: len(parts)] += torch.stack([part.detach().double() for part in parts]).cpu()

    def _writes_a_row(self) -> bool:
        """Tell whether metrics.csv gets a row after this step."""
        step, settings = self.global_step + 1, self.settings
        grids = (settings.log_every_steps, settings.eval_every_steps)
        return step == settings.max_steps or any(every and step % every == 0 for every in grids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Carry the sums of steps that are not logged yet through a resume."""
        checkpoint["sums_4"] = self.sums_4.clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up those sums."""
        self.sums_4 = checkpoint["sums_4"].clone()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all trained parameters, and refuse to step on a number that is none."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.settings.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.grad_norm = float(norm)
        if not torch.isfinite(norm):
            raise DrafttrainError(
                f"step {self.global_step + 1}: the gradient is not finite. Lower train.lr, or set train.precision: fp32; "
                "the last checkpoint is untouched."
            )

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = build_optimizer(self.trained, self.settings, lr_factor=self.trained.lr_factor)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, self.settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class HeadModule(StepModule):
    """Trains a head on labelled draft tokens."""

    trained: TokenHead

    def training_step(self, batch: HeadBatch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch: a sum over rows, divided by the weights of all rows of the step."""
        labels_N = batch.rows.labels_N
        loss_N = self.trained.loss(self.trained(batch.rows.features_ND), labels_N)
        weight = self.trained.weights(labels_N).sum()
        self._count(loss_N.detach().sum(), weight)
        return self._scaled(loss_N.sum(), batch)


class DistillModule(StepModule):
    """Trains a drafter against a frozen target. The target is no submodule: it never enters a checkpoint.

    Args:
        target: None when neither the drafter nor the loss asks for one, or when batches bring cached rows.
        vocab_size: Ids that target, drafter and tokenizer share; logits are cut to these.
    """

    trained: Drafter

    def __init__(
        self, drafter: Drafter, loss: Loss, *, target: Target | None, settings: TrainSettings, vocab_size: int
    ) -> None:
        super().__init__(drafter, settings=settings)
        self.loss = loss
        self.vocab_size = vocab_size
        self._target = target

    def training_step(self, batch: DraftBatch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, scaled so that the gradients of a step add up to the mean over its positions."""
        batch = self._with_target(batch)
        drafted = self.trained(batch)
        rows = align(drafted, batch, block_length=getattr(self.loss, "block_length", 1))
        loss_N, acceptance_N = row_losses(
            self.loss,
            drafted,
            rows,
            batch,
            vocab_size=self.vocab_size,
            chunk_rows=self.settings.loss_chunk_rows,
            measured=self._writes_a_row(),
        )
        acceptance = () if acceptance_N is None else (acceptance_N.sum(), acceptance_N.new_tensor(len(acceptance_N)))
        self._count(loss_N.detach().sum(), loss_N.new_tensor(float(len(loss_N))), *acceptance)
        total = loss_N.sum() if drafted.extra_loss is None else loss_N.sum() + drafted.extra_loss
        return self._scaled(total, batch)

    def _with_target(self, batch: DraftBatch) -> DraftBatch:
        from dataclasses import replace

        needs = self.trained.needs()
        rows_needed = self.loss.needs_target and batch.target_rows is None
        if (batch.target or TargetOutput()).has(needs) and not rows_needed:
            return batch
        assert self._target is not None, "the pipeline loads a target when the drafter or the loss needs one"
        seen = self._target.read(batch.tokens_BT, batch.positions_BT, needs | TargetNeeds(final=rows_needed))
        rows = self._target.rows_of(seen) if rows_needed else batch.target_rows
        return replace(batch, target=seen, target_rows=rows)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the loss roll what it carries from step to step."""
        super().optimizer_step(*args, **kwargs)
        self.loss.end_of_step()
