"""Checkpoints that a training resumes from: every N steps, and when it is asked to stop."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError, Interrupted
from drafttrain.core.files import folder_beside, only_full
from drafttrain.distributed.collectives import at_step, first_before_others, shared, sums_later
from drafttrain.distributed.world import is_first, world
from drafttrain.training.callbacks import StepEnd
from drafttrain.training.checkpoint_file import CheckpointFile
from drafttrain.training.full_disk import could_be_written
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_module import StepModule
from drafttrain.training.strategy import whole

UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError),
    *(RuntimeError, EOFError, ValueError, KeyError),
)
"""Errors that readers raise for a file that is not a checkpoint."""


class Checkpoints(StepEnd):
    """Saves a checkpoint every N steps, keeps the last ones, and on a signal saves one and stops."""

    phase = "checkpoint"

    def __init__(self, folder: Path, *, settings: TrainSettings, copies: bool = True) -> None:
        self.folder = folder
        self.settings = settings
        self.file = CheckpointFile(stall_seconds=settings.timeout_seconds, written=self._drop_others)
        """The trainer writes through this."""
        self.file.copies = copies
        self._under_way: int | None = None
        """The step whose checkpoint is being written; the same on all processes."""
        self._asked_to_stop = False
        self._heard_before: Callable[[], list[float]] = lambda: [0, 0]
        """How many processes were asked to stop and how many failed to write, as of the end of the previous step."""

    @contextmanager
    def taking_requests(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT in place of the command line, also before the first step and after the last one.

        Raises:
            Interrupted: It was asked to stop where there was no step to end.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._take_signals()
            yield
            self.settle()
        except SystemExit:
            # Lightning's own handler of SIGTERM, until it is replaced.
            if not self._asked_to_stop:
                raise
        finally:
            self._finish_alone()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._asked_to_stop:
            raise Interrupted("stopped between steps: run the same command to continue")

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which would stop in the middle of a step."""
        self._take_signals()

    def _ask(self, *_: Any) -> None:
        self._asked_to_stop = True
        say("asked to stop: finishing this step and saving")

    def on_step_end(self, trainer: Trainer, module: StepModule, step: int) -> None:
        """Save, and stop if any process was asked to."""
        at_step(step)
        stops, failed = self._heard(step)
        if failed:
            self.settle()
        if step % self.settings.checkpoint_every_steps == 0 or stops:
            self.save(trainer, step)
        if stops:
            self.settle()
            raise Interrupted(f"stopped at step {step} of {self.settings.max_steps}: run the same command to continue")

    def _heard(self, step: int) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether a checkpoint could not be written; the same on all processes.

        Several processes hear of each other one step later, so that none waits; at the last step there is no later one.
        """
        answers = sums_later([self._asked_to_stop, self.file.failed])
        stops, failed = self._heard_before()
        self._heard_before = answers
        if world().size == 1 or step == self.settings.max_steps:
            stops, failed = answers()
        return stops > 0, failed > 0

    def save(self, trainer: Trainer, step: int) -> None:
        """Start to write one checkpoint, once the previous one is on the disk; training continues meanwhile."""
        self.settle()
        self._under_way = step
        trainer.save_checkpoint(self._path(step))
        if not self.file.copies:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is on the disk; all processes must call it.

        The others wait through the store, not in a collective, which would end after `train.timeout_seconds`.

        Raises:
            DrafttrainError: It could not be written, and the recipe does not say to continue without it.
        """
        step, self._under_way = self._under_way, None
        if step is None:
            return
        what, failure = f"{self._path(step)}, the checkpoint of step {step}", None
        with first_before_others(f"it writes the checkpoint of step {step}"):
            if is_first() and (error := self.file.finished()):
                failure = self._no_room(error, what)
        could_be_written(what, failure, settings=self.settings, instead=self._before())

    def _finish_alone(self) -> None:
        """Finish the checkpoint that is being written when the training ends with an error, and never hide that error."""
        try:
            error = self.file.finished()
        except DrafttrainError as stalled:
            error = stalled
        if error is not None:
            say(f"a checkpoint could not be written: {error}; {self._before()}")

    def _no_room(self, error: Exception, what: str) -> OSError:
        """Return the error if it means that the disk is full.

        Raises:
            DrafttrainError: It is another error of the disk.
        """
        if not isinstance(error, OSError):
            raise error
        try:
            return only_full(error)
        except OSError as other:
            reason = other.strerror or str(other)
            raise DrafttrainError(f"{what} could not be written ({reason}); {self._before()}") from other

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.ckpt"

    def _before(self) -> str:
        before = sorted(self.folder.glob("step-*.ckpt"))
        return f"the one before it, {before[-1].name}, is untouched" if before else "there is none before it"

    def _drop_others(self) -> None:
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.settings.keep_checkpoints]:
            old.unlink()


def save_trained(module: StepModule, folder: Path) -> None:
    """Write the trained weights as a folder atomically, from the first process; all processes must call it."""
    with whole(module.trained.parameters()):
        if is_first():
            with folder_beside(folder) as temporary:
                module.trained.save(temporary)


def newest_checkpoint_for_all(folder: Path) -> Path | None:
    """Return the checkpoint that every process resumes from: the first process finds one that can be read."""
    with first_before_others("it looks for the newest checkpoint"):
        found = newest_checkpoint(folder) if is_first() else None
    name = shared(None if found is None else found.name)[0]
    return None if name is None else folder / name


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint; damaged ones are quarantined and reported."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        if damage := _damage(path):
            say(f"{path} is damaged ({damage}): falling back to the checkpoint before it")
            path.rename(path.with_suffix(".damaged"))
            continue
        return path
    return None


def _damage(path: Path) -> str:
    """Return what is wrong with a checkpoint; empty if its checksums match and torch can read it.

    Raises:
        OSError: It cannot be read for another reason than its content or its disk.
        RuntimeError: There is no memory left to look; that is no damage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not verify the checksums.
            if changed := archive.testzip():
                return f"{changed} is not what was written"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EINVAL):
            raise
        return str(error.strerror)
    except UNREADABLE as error:
        if os.strerror(errno.ENOMEM) in str(error):
            raise
        return type(error).__name__
    return ""


def weights_of_checkpoint(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the step and the trained weights of a checkpoint from any layout."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "trained."
    weights = {
        name.removeprefix(prefix): value for name, value in stored["state_dict"].items() if name.startswith(prefix)
    }
    return int(stored["global_step"]), weights
