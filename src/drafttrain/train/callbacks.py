"""What happens around steps: logs, progress, validation by replay, checkpoints, stop on request, the frozen target."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DrafttrainError, Interrupted
from drafttrain.core.files import folder_beside, write_json, written_beside
from drafttrain.core.processes import at_step, first
from drafttrain.target import Target
from drafttrain.train.module import StepModule
from drafttrain.train.settings import TrainSettings
from drafttrain.train.strategy import whole

COLUMNS = (
    "step",
    "loss",
    "acceptance_rate",
    "one_minus_acceptance_rate",
    "lr",
    "grad_norm",
    "skipped_steps",
    "tokens",
    "seconds",
)
"""Of metrics.csv, before one `validation_` column for each figure that is measured on held-out data."""


class StepEnd(Callback):
    """A callback that acts once an optimizer step, after its last micro-batch."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Find the ends of optimizer steps."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        assert isinstance(module, StepModule)
        self.on_step_end(trainer, module, trainer.global_step)

    @staticmethod
    def sum_of(trainer: Trainer, number: float) -> float:
        """Return a number added up over all processes."""
        if trainer.world_size == 1:
            return number
        return float(trainer.strategy.reduce(torch.tensor(float(number), dtype=torch.float64), reduce_op="sum"))

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Act after `step` optimizer steps."""


@dataclass(frozen=True)
class HeldOut:
    """What is measured of the weights on held-out data."""

    estimate: Callable[[Any], Mapping[str, Any]]
    """From a drafter or head in evaluation mode to its figures by name, and `said`: a line for the user."""
    figures: tuple[str, ...] = ("alpha", "block_efficiency")
    best_by: str = "block_efficiency"
    """The figure that picks the best step: the larger, the better."""


class Validation(StepEnd):
    """Every N steps: figures on held-out data; the best weights are kept as a folder."""

    def __init__(self, held_out: HeldOut, *, settings: TrainSettings, folder: Path) -> None:
        self.held_out = held_out
        self.settings = settings
        self.folder = folder
        self.latest: Mapping[str, Any] = {}
        """What was measured at the step that just ended; empty: nothing was."""
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the start, so that a run that made it worse exports the start."""
        if trainer.global_step == 0:
            assert isinstance(module, StepModule)
            self.on_step_end(trainer, module, 0)

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Estimate, and keep the weights if they are the best so far."""
        self.latest = {}
        every = self.settings.eval_every_steps
        if not every or (step % every and step != self.settings.max_steps):
            return
        module.trained.eval()
        with torch.no_grad(), whole(module.trained.parameters()):
            self.latest = dict(self.held_out.estimate(module.trained), step=step)
        module.trained.train()
        value = self.latest[self.held_out.best_by]
        self.last = {"step": step} | {name: self.latest[name] for name in self.held_out.figures}
        if value > self.best.get(self.held_out.best_by, float("-inf")):
            self.best = dict(self.last)
            save_trained(module, self.folder / "best")
            if trainer.is_global_zero:
                write_json(self.folder / "best.json", self.best)
        say(f"step {step}: {self.latest['said']}")

    def state_dict(self) -> dict[str, Any]:
        """Carry what is best, and what was last, through a resume."""
        return {"best": dict(self.best), "last": dict(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was best, and what was last."""
        self.best, self.last = dict(state_dict["best"]), dict(state_dict["last"])


class MetricsLog(StepEnd):
    """Writes metrics.csv (flushed row by row, cut back to the step of a resume) and passes the same rows to loggers."""

    def __init__(self, path: Path, *, settings: TrainSettings, validation: Validation | None) -> None:
        self.path = path
        self.settings = settings
        self.validation = validation
        figures = validation.held_out.figures if validation else ("alpha", "block_efficiency")
        self.columns = [*COLUMNS, *(f"validation_{name}" for name in figures)]
        self._tokens = 0
        self._own_tokens = 0
        self._seconds_before = 0.0
        self._began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the file; after a resume, forget rows of steps that are taken again."""
        self._began = time.perf_counter()
        if not trainer.is_global_zero:
            return
        rows = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= trainer.global_step]
        with written_beside(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        if not rows and self.validation is not None and self.validation.latest:
            self._write(trainer, 0, {})

    def state_dict(self) -> dict[str, Any]:
        """Carry what was counted through a resume, also between two rows."""
        return {"tokens": self._tokens, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was counted."""
        self._tokens, self._seconds_before = state_dict["tokens"], state_dict["seconds"]

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count tokens read."""
        self._own_tokens += batch.num_tokens

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Write a row every N steps, at validations and at the end."""
        self._tokens += round(self.sum_of(trainer, self._own_tokens))
        self._own_tokens = 0
        validated = self.validation is not None and bool(self.validation.latest)
        if step % self.settings.log_every_steps and step != self.settings.max_steps and not validated:
            return
        sums_4 = trainer.strategy.reduce(module.sums_4, reduce_op="sum")
        loss, count, acceptance, measured = (float(x) for x in sums_4)
        module.sums_4.zero_()
        rate = acceptance / measured if measured else float("nan")
        self._write(
            trainer,
            step,
            {
                "loss": repr(loss / count),
                "acceptance_rate": "" if rate != rate else repr(rate),
                "one_minus_acceptance_rate": "" if rate != rate else repr(1 - rate),
                "lr": repr(trainer.optimizers[0].param_groups[0]["lr"]),
                "grad_norm": repr(module.grad_norm),
                "skipped_steps": str(module.skipped),
            },
        )

    def _write(self, trainer: Trainer, step: int, values: dict[str, str]) -> None:
        row: dict[str, Any] = {
            "step": step,
            "tokens": self._tokens,
            "seconds": round(self._seconds, 3),
            **values,
        }
        if self.validation is not None and self.validation.latest:
            row |= {
                f"validation_{name}": repr(self.validation.latest[name]) for name in self.validation.held_out.figures
            }
        if not trainer.is_global_zero:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        numbers = {name: float(value) for name, value in row.items() if name != "step" and value != ""}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)


class Checkpoints(StepEnd):
    """Saves what a resume needs every N steps, keeps the last two, and stops with a checkpoint when asked to by a signal."""

    KEPT = 2

    def __init__(self, folder: Path, *, settings: TrainSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._asked_to_stop = False

    @contextmanager
    def taking_requests(self) -> Iterator[None]:
        """Answer SIGTERM and SIGINT in place of the command line, before the first step and after the last one too.

        Raises:
            Interrupted: It was asked to stop where there was no step to end.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._take_signals()
            yield
        except SystemExit:
            # Lightning's own answer to SIGTERM, until its handler is replaced.
            if not self._asked_to_stop:
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._asked_to_stop:
            raise Interrupted("stopped between steps: run the same command to continue")

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the signals back from Lightning, which would leave in the middle of a step."""
        self._take_signals()

    def _ask(self, *_: Any) -> None:
        self._asked_to_stop = True
        say("asked to stop: finishing this step and saving")

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Save, and stop if that was asked of any process."""
        at_step(step)
        stops = self.sum_of(trainer, self._asked_to_stop) > 0
        if step % self.settings.checkpoint_every_steps == 0 or stops:
            self.save(trainer, step)
        if stops:
            raise Interrupted(f"stopped at step {step} of {self.settings.max_steps}: run the same command to continue")

    def save(self, trainer: Trainer, step: int) -> None:
        """Write one checkpoint beside and rename it; then drop the ones that are no longer needed."""
        path = self.folder / f"step-{step:08d}.ckpt"
        temporary = path.with_suffix(".part")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.KEPT]:
                old.unlink()
        trainer.strategy.barrier()


class Progress(StepEnd):
    """A bar with steps, loss, tokens a second and the time left; log lines where the output is no terminal."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        self._bar: Any = None
        self._tokens = 0
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar at the step that the run continues from."""
        self._bar = self._stack.enter_context(progress("training", total=self.settings.max_steps, unit="steps"))
        self._bar.advance(trainer.global_step)
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count tokens."""
        self._tokens += batch.num_tokens * trainer.world_size  # as if all had as many: a rate for the eye

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Move the bar."""
        per_second = self._tokens / max(1e-9, time.perf_counter() - self._began)
        self._bar.note(f"{per_second:,.0f} tokens/s")
        self._bar.advance(1)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Close the bar however the training ended."""
        self._stack.close()


class FrozenTarget(Callback):
    """Proves that the target did not change: its weights have the same digest before and after."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.before = target.weights_sha256()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare."""
        if self.target.weights_sha256() != self.before:
            raise DrafttrainError("the target's weights changed during training: they must stay frozen")


def save_trained(module: StepModule, folder: Path) -> None:
    """Write the trained weights as a folder, whole or not at all, from the first process; all must call it."""
    with whole(module.trained.parameters()):
        if first():
            with folder_beside(folder) as temporary:
                module.trained.save(temporary)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that can be read whole; damaged ones are set aside and named."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            say(f"{path} is damaged ({type(error).__name__}): falling back to the checkpoint before it")
            path.rename(path.with_suffix(".damaged"))
            continue
        return path
    return None


def weights_of_checkpoint(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the step of a checkpoint and the weights of what it trains, whatever layout wrote it."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "trained."
    weights = {
        name.removeprefix(prefix): value for name, value in stored["state_dict"].items() if name.startswith(prefix)
    }
    return int(stored["global_step"]), weights
