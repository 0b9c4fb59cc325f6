"""Callbacks at the end of optimizer steps: their base class, the progress bar, the check of the frozen target."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from drafttrain.core.console import progress
from drafttrain.core.errors import DrafttrainError
from drafttrain.target_model import Target
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_module import StepModule


class StepEnd(Callback):
    """A callback that runs once for each optimizer step, after its last micro-batch."""

    phase: ClassVar[str] = "other"
    """The phase of `StepClock` that its time counts as."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Call `on_step_end` after the last micro-batch of an optimizer step."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        assert isinstance(module, StepModule)
        module.clock.enter(self.phase)
        self.on_step_end(trainer, module, trainer.global_step)
        module.clock.enter("other")

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Run after `step` optimizer steps."""


class Progress(StepEnd):
    """A progress bar with steps, tokens per second and the remaining time; log lines if the output is not a terminal."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        self._bar: Any = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar at the step from which the run continues."""
        self._bar = self._stack.enter_context(progress("training", total=self.settings.max_steps, unit="steps"))
        self._bar.advance(trainer.global_step)
        self._began = time.perf_counter()

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Advance the bar."""
        tokens = module.tokens * trainer.world_size  # As if all processes had as many: only a display.
        per_second = tokens / max(1e-9, time.perf_counter() - self._began)
        self._bar.note(f"{per_second:,.0f} tokens/s")
        self._bar.advance(1)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Close the bar as unfinished. An output that cannot be written must not hide the error."""
        with suppress(OSError):
            self._stack.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._stack.close()


class FrozenTarget(Callback):
    """Proves that the target did not change: its weights have the same digest before and after."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.before = target.weights_digest()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare the digests."""
        if self.target.weights_digest() != self.before:
            raise DrafttrainError("the target's weights changed during training: they must stay frozen")
