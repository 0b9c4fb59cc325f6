"""What every training shares around its step: sums for the log, clipping, skipped steps, optimizer and schedule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from drafttrain.core.batches import DraftBatch, Late
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DrafttrainError
from drafttrain.distributed.collectives import sums_over_processes
from drafttrain.heads import TokenHead
from drafttrain.heads.rows import HeadBatch
from drafttrain.losses.step import share_of_step
from drafttrain.target_model.weights_digest import add_to_digest
from drafttrain.training.optimizer import build_optimizer, learning_rate_scale
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_clock import StepClock
from drafttrain.training.strategy import ZeroStrategy


class StepModule(LightningModule):
    """Base of all training modules: sums for the log, clipping, optimizer and schedule.

    Args:
        trained: The drafter or head; `save(folder)` writes it.
    """

    def __init__(self, trained: Any, *, settings: TrainSettings) -> None:
        super().__init__()
        self.trained = trained
        self.settings = settings.on(next(trained.parameters()).device.type, head=isinstance(trained, TokenHead))
        self.sums_4 = torch.zeros(4, dtype=torch.float64)
        """Sums since the last row: loss, its positions; acceptance rate, its positions (only steps that measure it)."""
        self.figures: dict[str, Tensor] = {}
        """(sum, rows) of each further figure at the step of the next row."""
        self.lr = 0.0
        """Learning rate of the last step."""
        self.grad_norm = 0.0
        self.skipped = 0
        """All steps that were skipped because their gradient was not finite."""
        self.groups: list[dict[str, Any]] = []
        """The parameter groups that the optimizer was built with."""
        self.clock = StepClock()
        self.tokens = 0
        """Tokens that this process has read in this run, without padding."""
        self._flops = 0
        self._uncounted: list[Callable[[], int]] = []
        self._in_a_row = 0
        self.strict_loading = False
        self.frozen_digest = self._digest_beside_adapters()
        """Of the drafter's own weights, if adapters are trained beside them; empty: there are none."""

    def _digest_beside_adapters(self) -> str:
        if getattr(self.trained, "lora", None) is None:
            return ""
        digest = hashlib.sha256()
        for name, weight in sorted(self.trained.named_parameters()):
            if not weight.requires_grad:
                add_to_digest(digest, name, weight)
        return digest.hexdigest()

    def on_train_start(self) -> None:
        """Start the clock on the device of the weights."""
        self.clock.begin(self.device)

    @property
    def flops(self) -> int:
        """Operations that the micro-batches since the last row need, on this process."""
        self._flops += sum(count() for count in self._uncounted)
        self._uncounted.clear()
        return self._flops

    @flops.setter
    def flops(self, value: int) -> None:
        self._flops = value
        self._uncounted.clear()

    def count_later(self, count: Callable[[], int]) -> None:
        """Add the operations of a micro-batch when `flops` is read: a step does not wait for this arithmetic."""
        self._uncounted.append(count)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """End the phase that waits for a batch, and count its tokens."""
        self.tokens += batch.num_tokens
        self.clock.enter("target")

    def on_before_backward(self, loss: Tensor) -> None:
        """Start the backward phase."""
        self.clock.enter("backward")

    def on_after_backward(self) -> None:
        """Start the optimizer phase."""
        self.clock.enter("optimizer")

    def on_train_batch_end(self, *_: Any) -> None:
        """Start the phase that waits for a batch."""
        self.clock.enter("fetch")

    def scaled(self, total: Tensor, batch: DraftBatch | HeadBatch) -> Tensor:
        """Return a micro-batch's sum, scaled so that the gradients of a step add up to the mean over its positions.

        If the sum is not finite, every gradient becomes NaN, on all processes, and the step is skipped: a gradient can be finite
        although its loss is not.
        """
        share = share_of_step(
            total, batch, world_size=self.trainer.world_size, accumulation=self.trainer.accumulate_grad_batches
        )
        return share * (1 + 0 * total.detach())

    def planned(self, batch: Any) -> Any:
        """Return a micro-batch with its plan, which the host computes before the batch is sent to the device."""
        return batch

    def made(self, late: Late) -> Any:
        """Return a micro-batch that depends on the current weights."""
        self.clock.enter("draw")
        batch = late.made()
        self.clock.enter("fetch")
        return batch

    def count(self, *parts: Tensor | float) -> None:
        """Add to the sums in order; they stay on the loss's device until they are read."""
        self.sums_4 = self.sums_4.to(self.device)
        for number, part in enumerate(parts):
            self.sums_4[number].add_(part.detach() if isinstance(part, Tensor) else part)

    @property
    def figure_names(self) -> Sequence[str]:
        """Further columns of metrics.csv."""
        return ()

    def count_figures(self, figures: Mapping[str, tuple[Tensor, int]]) -> None:
        """Add a micro-batch's (sum over rows, rows) of each figure."""
        for name, (total, rows) in figures.items():
            own_2 = torch.stack([total.detach().double(), total.new_tensor(rows, dtype=torch.float64)])
            self.figures[name] = own_2 + self.figures.get(name, 0.0)

    def take_figures(self) -> list[float]:
        """Return the sum and the rows of every named figure since the last call."""
        found = [self.figures.get(name, torch.zeros(2)).tolist() for name in self.figure_names]
        self.figures.clear()
        return [number for pair in found for number in pair]

    def writes_a_row(self) -> bool:
        """Return whether metrics.csv gets a row after this step."""
        step, settings = self.global_step + 1, self.settings
        grids = (settings.log_every_steps, settings.eval_every_steps)
        return step == settings.max_steps or any(every and step % every == 0 for every in grids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the sums of steps that are not logged yet, of all processes."""
        *sums, flops = sums_over_processes([*self.sums_4.tolist(), self.flops])
        checkpoint["sums_4"], checkpoint["flops"] = torch.tensor(sums, dtype=torch.float64), flops
        checkpoint["skipped"] = [self.skipped, self._in_a_row]
        checkpoint["frozen_digest"] = self.frozen_digest
        frozen = {n for n, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        checkpoint["state_dict"] = {n: value for n, value in checkpoint["state_dict"].items() if n not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums on the first process, and check that no trained weight is missing.

        Raises:
            CheckpointError: Naming the weights that are; or its adapters were trained beside other weights.
        """
        trained = {n for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        if missing := sorted(trained - checkpoint["state_dict"].keys()):
            raise CheckpointError(f"the checkpoint lacks {len(missing)} trained weights: {', '.join(missing[:5])}")
        if checkpoint.get("frozen_digest", "") != self.frozen_digest:
            raise CheckpointError(
                "the adapters of the checkpoint were trained beside other weights than the drafter starts from now: restore what "
                "drafter.checkpoint (or, cut from it, target.model) named then, or start another run"
            )
        if self.trainer.is_global_zero:
            self.sums_4 = checkpoint["sums_4"].clone()
            self.flops = round(checkpoint.get("flops", 0))
        self.skipped, self._in_a_row = checkpoint["skipped"]
        self._recount_micro_batches(checkpoint)

    def _recount_micro_batches(self, checkpoint: dict[str, Any]) -> None:
        """Convert the step count to this run's micro-batches: Lightning ends a step where their number is a multiple of the accumulation."""
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = done - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})

    def stepped(self, norm: float, *, skipped: bool) -> None:
        """Record the gradient norm of a step, and stop after too many skipped steps in a row.

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
        """Run after an optimizer step, before anything is logged or saved."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimizer step. DeepSpeed is called after every micro-batch and knows which one is the last."""
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
        """Clip by the norm over all trained parameters; a step whose norm is not finite changes nothing.

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
