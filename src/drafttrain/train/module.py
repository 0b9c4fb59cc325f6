"""The training step: drafter (or head), loss, one division.

B = sequences, T = positions, V = vocabulary, N = trained positions
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DrafttrainError
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.distributed.collectives import sums_over_processes
from drafttrain.drafters import Drafter
from drafttrain.heads import HeadBatch, TokenHead
from drafttrain.losses import Loss
from drafttrain.losses.align import align, planned
from drafttrain.losses.chunked import batch_loss, normalised, summed
from drafttrain.target_model import Target
from drafttrain.target_model.live_rows import LiveRows
from drafttrain.train.flops import distill_flops, head_flops
from drafttrain.train.optimizer import build_optimizer, learning_rate_scale
from drafttrain.train.settings import TrainSettings
from drafttrain.train.step_clock import StepClock
from drafttrain.train.strategy import ZeroStrategy


class StepModule(LightningModule):
    """What all trainings share: counts, clipping, optimizer and schedule.

    Args:
        trained: The drafter or head; `save(folder)` writes it.
    """

    def __init__(self, trained: Any, *, settings: TrainSettings) -> None:
        super().__init__()
        self.trained = trained
        self.settings = settings.on(next(trained.parameters()).device.type, head=isinstance(trained, TokenHead))
        self.sums_4 = torch.zeros(4, dtype=torch.float64)
        """Sums since the last log: loss, its positions; acceptance, its positions, of the steps that measure it."""
        self.lr = 0.0
        """Learning rate of the last step."""
        self.grad_norm = 0.0
        self.skipped = 0
        """Steps skipped in all, because their gradient was not finite."""
        self.groups: list[dict[str, Any]] = []
        """The optimizer's groups as it was built with."""
        self.clock = StepClock()
        self.flops = 0
        """Operations that the micro-batches since the last row need, on this process."""
        self._in_a_row = 0
        self.strict_loading = False

    def on_train_start(self) -> None:
        """Start the clock where the weights are."""
        self.clock.begin(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Leave the phase that waits for a batch."""
        self.clock.enter("target")

    def on_before_backward(self, loss: Tensor) -> None:
        """Leave the forward pass."""
        self.clock.enter("backward")

    def on_after_backward(self) -> None:
        """Leave the backward pass."""
        self.clock.enter("optimizer")

    def on_train_batch_end(self, *_: Any) -> None:
        """Wait for the next batch."""
        self.clock.enter("fetch")

    def _scaled(self, total: Tensor, batch: DraftBatch | HeadBatch) -> Tensor:
        """Return a micro-batch's sum, scaled so that the gradients of a step add up to the mean over its positions.

        A sum that is no finite number makes every gradient none, on all processes, so that the step is skipped: a gradient may
        be finite where its loss is not.
        """
        scaled = normalised(
            total, batch, world_size=self.trainer.world_size, accumulation=self.trainer.accumulate_grad_batches
        )
        return scaled * (1 + 0 * total.detach())

    def planned(self, batch: Any) -> Any:
        """Return a micro-batch with what the host can find out about it, before it is sent to the device."""
        return batch

    def _count(self, *parts: Tensor | float) -> None:
        """Add to the sums, from the first on; they stay where the loss is until somebody reads them."""
        self.sums_4 = self.sums_4.to(self.device)
        for number, part in enumerate(parts):
            self.sums_4[number].add_(part.detach() if isinstance(part, Tensor) else part)

    def _writes_a_row(self) -> bool:
        """Tell whether metrics.csv gets a row after this step."""
        step, settings = self.global_step + 1, self.settings
        grids = (settings.log_every_steps, settings.eval_every_steps)
        return step == settings.max_steps or any(every and step % every == 0 for every in grids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Carry the sums of steps that are not logged yet, of all processes, through a resume."""
        *sums, flops = sums_over_processes([*self.sums_4.tolist(), self.flops])
        checkpoint["sums_4"], checkpoint["flops"] = torch.tensor(sums, dtype=torch.float64), flops
        checkpoint["skipped"] = [self.skipped, self._in_a_row]
        frozen = {n for n, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        checkpoint["state_dict"] = {n: value for n, value in checkpoint["state_dict"].items() if n not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up those sums, on the first process, and look that no trained weight is missing.

        Raises:
            CheckpointError: Naming the weights that are.
        """
        trained = {n for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        if missing := sorted(trained - checkpoint["state_dict"].keys()):
            raise CheckpointError(f"a checkpoint lacks {len(missing)} trained weights: {', '.join(missing[:5])}")
        if self.trainer.is_global_zero:
            self.sums_4 = checkpoint["sums_4"].clone()
            self.flops = round(checkpoint.get("flops", 0))
        self.skipped, self._in_a_row = checkpoint["skipped"]
        self._count_micro_batches_anew(checkpoint)

    def _count_micro_batches_anew(self, checkpoint: dict[str, Any]) -> None:
        """Count the steps so far in this run's micro-batches: Lightning ends a step where their number is a multiple of its own."""
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = done - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})

    def stepped(self, norm: float, *, skipped: bool) -> None:
        """Note the norm of a step's gradient, and give up when too many in a row could not be used.

        Raises:
            DrafttrainError: There were more than `train.max_skipped_steps` of them.
        """
        self.grad_norm = norm
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
        step, allowed = self.global_step + 1, self.settings.max_skipped_steps
        if self._in_a_row > allowed:
            raise DrafttrainError(
                f"step {step}: the gradient is not finite, for the {ordinal(self._in_a_row)} time in a row "
                f"(train.max_skipped_steps: {allowed}). Lower train.lr, or set train.precision: fp32; "
                "the last checkpoint is untouched."
            )
        say(f"step {step}: the gradient is not finite, the step is skipped ({self.skipped} so far)")

    def end_of_step(self) -> None:
        """Act after an optimizer step, before anything is written or saved."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; DeepSpeed is asked after every micro-batch and knows itself which one is the last."""
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        super().optimizer_step(*args, **kwargs)
        if not self.trainer.fit_loop.epoch_loop._should_accumulate():
            self.end_of_step()
            self.clock.end_of_step()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all trained parameters; a step whose norm is no number changes nothing.

        Under DeepSpeed the engine does this.
        """
        if isinstance(self.trainer.strategy, ZeroStrategy):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.settings.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        skipped = not math.isfinite(norm)
        if skipped:
            for parameter in parameters:
                parameter.grad = None
        self.stepped(norm, skipped=skipped)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = build_optimizer(self.trained, self.settings, lr_factor=self.trained.lr_factor)
        self.groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, self.settings))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th ..."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


class HeadModule(StepModule):
    """Trains a head on labelled draft tokens."""

    trained: TokenHead

    def training_step(self, batch: HeadBatch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch: a sum over rows, divided by the weights of all rows of the step."""
        self.clock.enter("forward")
        self.flops += head_flops(self.trained, len(batch.rows))
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
        self.target = target

    def planned(self, batch: DraftBatch) -> DraftBatch:
        """Return a micro-batch with the rows that the loss and the drafter will ask for."""
        of_loss, *others = self.trained.rows_asked()
        block_length = getattr(self.loss, "block_length", 1)
        return planned(batch, [replace(of_loss, block_length=block_length), *others], slots=self.trained.reads_slots)

    def training_step(self, batch: DraftBatch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, scaled so that the gradients of a step add up to the mean over its positions."""
        batch = self._with_target(batch)
        self.clock.enter("forward")
        drafted = self.trained(batch)
        rows = align(drafted, batch, block_length=getattr(self.loss, "block_length", 1))
        made = batch_loss(
            self.loss,
            drafted,
            rows,
            batch,
            vocab_size=self.vocab_size,
            chunk_rows=self.settings.loss_chunk_rows,
            measured=self._writes_a_row(),
        )
        loss_N, acceptance_N = made.loss_N, made.acceptance_N
        acceptance = () if acceptance_N is None else (acceptance_N.sum(), len(acceptance_N))
        total = summed(made, drafted)
        self._count(total, len(loss_N), *acceptance)
        return self._scaled(total, batch)

    def _with_target(self, batch: DraftBatch) -> DraftBatch:
        needs = self.trained.needs()
        rows_needed = self.loss.needs_target and batch.target_rows is None
        reads = rows_needed or not (batch.target or TargetOutput()).has(needs)
        head = rows_needed or (self.loss.needs_target and isinstance(batch.target_rows, LiveRows))
        self.flops += distill_flops(self.trained, self.target, batch.shape, reads=reads, head=head)
        if not self._read_by_any(reads):
            return batch
        assert self.target is not None, "the pipeline loads a target when the drafter or the loss needs one"
        seen = self.target.read(
            batch.tokens_BT,
            batch.positions_BT,
            needs | TargetNeeds(final=rows_needed),
            documents=batch.packed_documents,
        )
        if not reads:
            return batch
        rows = self.target.rows_of(seen) if rows_needed else batch.target_rows
        return replace(batch, target=seen.to(batch.tokens_BT.device), target_rows=rows)

    def _read_by_any(self, reads: bool) -> bool:
        """Tell whether this process runs the target; one that is spread out is run by all where one process needs it."""
        if self.target is None or not self.target.spread:
            return reads
        return sums_over_processes([reads])[0] > 0

    def end_of_step(self) -> None:
        """Let the loss roll what it carries from step to step."""
        self.loss.end_of_step()
