"""A trace of some steps by torch.profiler, to open in Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from drafttrain.core.console import say
from drafttrain.training.callbacks import StepEnd
from drafttrain.training.step_module import StepModule


class Profile(StepEnd):
    """Traces the steps first..last on the first process, with the phases of `StepClock` as ranges."""

    def __init__(self, steps: tuple[int, int], *, folder: Path) -> None:
        self.first, self.last = steps
        self.path = folder / f"trace-steps-{self.first}-{self.last}.json"
        self._profiler: Any = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start at the first micro-batch of the first step."""
        if not trainer.is_global_zero or self._profiler is not None:
            return
        assert isinstance(module, StepModule)
        if self.first <= trainer.global_step + 1 <= self.last:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
            module.clock.label = True

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Write the trace after the last step."""
        if self._profiler is not None and step >= self.last:
            self._finish(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the trace so far if training ends earlier."""
        if self._profiler is not None:
            assert isinstance(module, StepModule)
            self._finish(module)

    def _finish(self, module: StepModule) -> None:
        module.clock.label = False
        module.clock.enter("other")
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.path))
        say(f"trace of steps {self.first} to {self.last}: {self.path} (open it at ui.perfetto.dev)")
        self._profiler = None
