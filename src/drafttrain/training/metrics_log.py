"""The training curve: metrics.csv, and the same rows for loggers."""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import only_full, written_beside
from drafttrain.core.peak import peak_of
from drafttrain.distributed.collectives import sums_over_processes
from drafttrain.distributed.world import world
from drafttrain.training.callbacks import StepEnd
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_clock import PHASES
from drafttrain.training.step_module import StepModule
from drafttrain.training.validation import OF_DRAFTERS, Validation

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
    "step_ms",
    *(f"{phase}_ms" for phase in PHASES if phase != "other"),
    "step_flops",
    "mfu",
)
"""Columns of metrics.csv; a `validation_` column for each figure on held-out data follows."""

UNCOUNTED = ("draw", "validation", "checkpoint")
"""Phases whose operations are not counted: `mfu` is over the others."""
TIMES = ("seconds", "step_ms", *(f"{phase}_ms" for phase in PHASES), "mfu")
"""Columns that differ between two identical runs."""


class MetricsLog(StepEnd):
    """Writes metrics.csv (flushed row by row, truncated to the step of a resume) and passes the same rows to loggers."""

    def __init__(self, path: Path, *, settings: TrainSettings, validation: Validation | None) -> None:
        self.path = path
        self.settings = settings
        self.validation = validation
        figures = validation.held_out.figures if validation else OF_DRAFTERS
        self.columns = [*COLUMNS, *(f"validation_{name}" for name in figures)]
        """The further figures of the module follow, once it is known."""
        self._unwritten: list[dict[str, Any]] = []
        """Rows that could not be written to a full disk."""
        self._last_row: int | None = 0
        """The step of the last row; None: not stored in the checkpoint of the resume."""
        self._tokens = 0
        """Tokens that all processes have read, those before a resume included."""
        self._own_tokens = self._own_counted = 0
        """Tokens that this process has read in this run, and how many of these are in `_tokens`."""
        self._seconds_before = 0.0
        self._began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the file; after a resume, drop the rows of steps that run again."""
        self._began = time.perf_counter()
        if self._last_row is None:
            # An older version wrote the checkpoint without operations, so those of the next row start here.
            self._last_row = trainer.global_step
        if not trainer.is_global_zero:
            return
        assert isinstance(module, StepModule)
        self.columns += [name for name in module.figure_names if name not in self.columns]
        rows = []
        if self.path.exists():
            # A row without a newline was being written when the run was killed.
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
            rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= trainer.global_step]
        with written_beside(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        if not rows and self.validation is not None and self.validation.latest:
            self._write(trainer, 0, {})

    def _count_all(self) -> None:
        """Add the tokens that all processes read since the last call; all must call it."""
        self._tokens += round(sums_over_processes([self._own_tokens - self._own_counted])[0])
        self._own_counted = self._own_tokens

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for a checkpoint, also between two rows; all processes call it."""
        self._count_all()
        return {"tokens": self._tokens, "seconds": self._seconds, "last_row": self._last_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self._tokens, self._seconds_before = state_dict["tokens"], state_dict["seconds"]
        self._last_row = state_dict.get("last_row")

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Write a row every N steps, at validations and at the end."""
        self._own_tokens = module.tokens
        validated = self.validation is not None and bool(self.validation.latest)
        if step % self.settings.log_every_steps and step != self.settings.max_steps and not validated:
            return
        self._count_all()
        steps, seconds = module.clock.steps, module.clock.read()
        further = module.take_figures()
        own = [*further, *module.sums_4.tolist(), module.flops, *seconds.values()]
        sums = sums_over_processes(own)
        further, (loss, count, acceptance, measured, flops, *times) = sums[: len(further)], sums[len(further) :]
        module.sums_4.zero_()
        module.flops = 0
        rate = acceptance / measured if measured else float("nan")
        self._write(
            trainer,
            step,
            {
                "loss": repr(loss / count) if count else "",
                "acceptance_rate": "" if rate != rate else repr(rate),
                "one_minus_acceptance_rate": "" if rate != rate else repr(1 - rate),
                "lr": repr(module.lr),
                "grad_norm": repr(module.grad_norm),
                "skipped_steps": str(module.skipped),
                **{
                    name: repr(total / rows) if rows else ""
                    for name, total, rows in zip(module.figure_names, further[::2], further[1::2], strict=True)
                },
                **self._explained(dict(zip(seconds, times, strict=True)), flops, module, step=step, timed=steps),
            },
        )
        self._last_row = step

    def _explained(
        self, times: dict[str, float], flops: float, module: StepModule, *, step: int, timed: int
    ) -> dict[str, str]:
        """Return the times and operations of a step: means over the steps since the last row and over the processes.

        Args:
            times: Seconds of each phase, summed over all processes.
            timed: Number of steps in these times: after a resume only those of this run.
        """
        steps = max(1, step - (self._last_row or 0))
        row = {"step_flops": str(round(flops / steps))}
        if not timed:
            return row
        scale = 1000 / (timed * world().size)
        row |= {f"{phase}_ms": f"{scale * times[phase]:.3f}" for phase in times if phase != "other"}
        row["step_ms"] = f"{scale * sum(times.values()):.3f}"
        peak = peak_of(module.device, self.settings.peak_tflops)
        training = sum(value for phase, value in times.items() if phase not in UNCOUNTED)
        if peak is not None and training > 0:
            # Both are sums over the processes: seconds of devices.
            row["mfu"] = f"{flops / steps * timed / (training * peak * 1e12):.4f}"
        return row

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
        """Append a row, with earlier rows that had no room. A file that cannot be extended stays unchanged."""
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
                    f"{self.path}: {failure.strerror}. Make room and run the same command to continue, or continue without "
                    "it with train.on_full_disk=continue"
                ) from error
            say(f"{self.path}: {failure.strerror}: {len(self._unwritten)} rows wait for room")
            return
        self._unwritten.clear()
