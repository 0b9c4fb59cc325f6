"""What happens around steps: logs, progress, validation by replay, checkpoints, stop on request, the frozen target."""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DrafttrainError, Interrupted
from drafttrain.core.files import folder_beside, write_json, written_beside
from drafttrain.core.processes import at_step, first, first_before_others, shared
from drafttrain.target import Target
from drafttrain.train.full_disk import CheckpointFile, could_be_written, only_full
from drafttrain.train.module import StepModule
from drafttrain.train.result import folder_of_step, kept_steps
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
    """Every N steps: figures on held-out data; the weights of the best steps are kept as folders.

    What is kept stands in `best.json`, the best first, and in `best/step-<N>/`.
    """

    def __init__(self, held_out: HeldOut, *, settings: TrainSettings, folder: Path) -> None:
        self.held_out = held_out
        self.settings = settings
        self.folder = folder
        self.latest: Mapping[str, Any] = {}
        """What was measured at the step that just ended; empty: nothing was."""
        self.last: dict[str, Any] = {}
        self.kept: list[dict[str, Any]] = []
        """The figures of the steps whose weights are kept, the best first."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Take up what is kept, also of steps after the checkpoint that the run continues from."""
        self.kept = shared(kept_steps(self.folder) if trainer.is_global_zero else None)[0]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the start, so that a run that made it worse exports the start."""
        if trainer.global_step == 0:
            assert isinstance(module, StepModule)
            self.on_step_end(trainer, module, 0)

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Estimate, and keep the weights if they are among the best so far."""
        self.latest = {}
        every = self.settings.eval_every_steps
        if not every or (step % every and step != self.settings.max_steps):
            return
        module.trained.eval()
        with torch.no_grad(), whole(module.trained.parameters()):
            self.latest = dict(self.held_out.estimate(module.trained), step=step)
        module.trained.train()
        # One process decides for all: what follows gathers weights, and figures may differ in their last bit between hosts.
        figure = self.held_out.best_by
        self.last = {"step": step} | {name: self.latest[name] for name in self.held_out.figures}
        self.last[figure] = shared(float(self.latest[figure]))[0]
        others = [one for one in self.kept if one["step"] != step]
        new = len(others) == len(self.kept) and math.isfinite(self.last[figure])
        # Of equal ones the earlier.
        ranked = sorted([*others, self.last], key=lambda one: -one[figure])[: self.settings.keep_best]
        if new and self.last in ranked and self._keep(module, step, ranked):
            self.kept = ranked
        say(f"step {step}: {self.latest['said']}")

    def _keep(self, module: StepModule, step: int, ranked: list[dict[str, Any]]) -> bool:
        """Write the weights, from the first process; tell whether the disk had room for them."""
        failure = None
        path = folder_of_step(self.folder, step)
        try:
            save_trained(module, path)
            if first():
                write_json(self.folder / "best.json", ranked)
                for other in set(path.parent.glob("step-*")) - {folder_of_step(self.folder, o["step"]) for o in ranked}:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError as error:
            failure = only_full(error)
        what = "the best" if ranked[0]["step"] == step else "one of the best"
        best = f"the best before it, of step {self.kept[0]['step']}, stays" if self.kept else "nothing was kept before"
        return could_be_written(
            f"{path}, {what} weights so far (step {step})", failure, settings=self.settings, instead=best
        )

    def state_dict(self) -> dict[str, Any]:
        """Carry what was last through a resume; what is best stands on the disk."""
        return {"last": dict(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was last."""
        self.last = dict(state_dict["last"])


class MetricsLog(StepEnd):
    """Writes metrics.csv (flushed row by row, cut back to the step of a resume) and passes the same rows to loggers."""

    def __init__(self, path: Path, *, settings: TrainSettings, validation: Validation | None) -> None:
        self.path = path
        self.settings = settings
        self.validation = validation
        figures = validation.held_out.figures if validation else ("alpha", "block_efficiency")
        self.columns = [*COLUMNS, *(f"validation_{name}" for name in figures)]
        self._unwritten: list[dict[str, Any]] = []
        """Rows that a full disk did not take."""
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
            # A row without its end was being written when the run was killed.
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
            rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= trainer.global_step]
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
        self._append(row)
        numbers = {name: float(value) for name, value in row.items() if name != "step" and value != ""}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)

    def _append(self, row: dict[str, Any]) -> None:
        """Write a row, and those that had no room before it; a file that cannot take them stays as it was."""
        self._unwritten.append(row)
        before = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(self._unwritten)
        except OSError as error:
            failure = only_full(error)
            os.truncate(self.path, before)
            if self.settings.on_full_disk == "stop":
                raise DrafttrainError(
                    f"{self.path}: {failure.strerror}. Make room and run the same command to continue, or let the run go on "
                    "with train.on_full_disk=continue"
                ) from error
            say(f"{self.path}: {failure.strerror}: {len(self._unwritten)} rows wait for room")
            return
        self._unwritten.clear()


class Checkpoints(StepEnd):
    """Saves what a resume needs every N steps, keeps the last two, and stops with a checkpoint when asked to by a signal."""

    KEPT = 2

    def __init__(self, folder: Path, *, settings: TrainSettings) -> None:
        self.folder = folder
        self.settings = settings
        self.file = CheckpointFile()
        """The trainer writes through this."""
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
        before = sorted(self.folder.glob("step-*.ckpt"))
        instead = f"the one before it, {before[-1].name}, is untouched" if before else "there is none before it"
        if not could_be_written(
            f"{path}, the checkpoint of step {step}", self.file.failure, settings=self.settings, instead=instead
        ):
            return
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

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Close the bar as one that did not reach its end; that it cannot be said must not hide why."""
        with suppress(OSError):
            self._stack.__exit__(type(exception), exception, exception.__traceback__)

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


def newest_checkpoint_for_all(folder: Path) -> Path | None:
    """Return the checkpoint that every process continues from: the first one looks which can be read."""
    with first_before_others("it looks for the newest checkpoint"):
        found = newest_checkpoint(folder) if first() else None
    name = shared(None if found is None else found.name)[0]
    return None if name is None else folder / name


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
