"""Figures on held-out data every N steps, and the weights of the best steps."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from drafttrain.core.console import say
from drafttrain.core.files import only_full, write_json
from drafttrain.distributed.collectives import shared
from drafttrain.distributed.world import is_first
from drafttrain.training.callbacks import StepEnd
from drafttrain.training.checkpoints import save_trained
from drafttrain.training.full_disk import could_be_written
from drafttrain.training.precision import training_autocast
from drafttrain.training.result import folder_of_step, kept_steps
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_module import StepModule
from drafttrain.training.strategy import whole

OF_DRAFTERS = ("alpha", "block_efficiency", "block_efficiency_low", "block_efficiency_high")
"""Figures of a drafter; the last two are the 95 % interval over the held-out texts."""


@dataclass(frozen=True)
class HeldOut:
    """Which figures are measured on held-out data."""

    estimate: Callable[[Any], Mapping[str, Any]]
    """From a drafter or head in evaluation mode to its figures by name, and `message`: the line that is logged."""
    figures: tuple[str, ...] = OF_DRAFTERS
    best_by: str = "block_efficiency"
    """The figure that selects the best step; larger is better."""


class Validation(StepEnd):
    """Every N steps: figures on held-out data. The weights of the best steps are kept as folders.

    `best.json` lists these steps, the best first; `best/step-<N>/` holds the weights.
    """

    phase = "validation"

    def __init__(self, held_out: HeldOut, *, settings: TrainSettings, folder: Path) -> None:
        self.held_out = held_out
        self.settings = settings
        self.folder = folder
        self.latest: Mapping[str, Any] = {}
        """The figures measured at the step that just ended; empty: none were."""
        self.last: dict[str, Any] = {}
        self.kept: list[dict[str, Any]] = []
        """The figures of the steps whose weights are kept, best first."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Load the kept steps, including those after the checkpoint that the run resumes from."""
        self.kept = shared(kept_steps(self.folder) if trainer.is_global_zero else None)[0]
        if trainer.is_global_zero:
            self._drop_others(self.kept)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the start, so that the start is exported if training made it worse."""
        if trainer.global_step == 0:
            assert isinstance(module, StepModule)
            self.on_step_end(trainer, module, 0)

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Measure, and keep the weights if they are among the best so far."""
        self.latest = {}
        every = self.settings.eval_every_steps
        if not every or (step % every and step != self.settings.max_steps):
            return
        module.trained.eval()
        device = next(module.trained.parameters()).device
        with torch.no_grad(), whole(module.trained.parameters()), training_autocast(self.settings, device):
            self.latest = dict(self.held_out.estimate(module.trained), step=step)
        module.trained.train()
        # One process decides for all: saving gathers weights, and figures may differ in the last bit between hosts.
        figure = self.held_out.best_by
        self.last = {"step": step} | {name: self.latest[name] for name in self.held_out.figures}
        self.last[figure] = shared(float(self.latest[figure]))[0]
        others = [one for one in self.kept if one["step"] != step]
        new = len(others) == len(self.kept) and math.isfinite(self.last[figure])
        # Ties go to the earlier step.
        ranked = sorted([*others, self.last], key=lambda one: -one[figure])[: self.settings.keep_best]
        if new and self.last in ranked and self._keep(module, step, ranked):
            self.kept = ranked
        say(f"step {step}: {self.latest['message']}")

    def _keep(self, module: StepModule, step: int, ranked: list[dict[str, Any]]) -> bool:
        """Write the weights from the first process; return whether the disk had room."""
        failure = None
        path = folder_of_step(self.folder, step)
        try:
            save_trained(module, path)
            if is_first():
                write_json(self.folder / "best.json", ranked)
                self._drop_others(ranked)
        except OSError as error:
            failure = only_full(error)
        what = "the best" if ranked[0]["step"] == step else "one of the best"
        best = f"the best before it, of step {self.kept[0]['step']}, stays" if self.kept else "nothing was kept before"
        return could_be_written(
            f"{path}, {what} weights so far (step {step})", failure, settings=self.settings, instead=best
        )

    def _drop_others(self, kept: list[dict[str, Any]]) -> None:
        """Remove the weights of other steps, including those that a killed run left behind."""
        for other in set((self.folder / "best").glob("step-*")) - {
            folder_of_step(self.folder, o["step"]) for o in kept
        }:
            shutil.rmtree(other, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """Store the last figures in checkpoints; the best are on the disk."""
        return {"last": dict(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last figures."""
        self.last = dict(state_dict["last"])
