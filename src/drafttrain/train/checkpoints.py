"""What a training can continue from: checkpoints every N steps and when it is asked to stop."""

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
from drafttrain.core.errors import Interrupted
from drafttrain.core.files import folder_beside
from drafttrain.core.processes import at_step, first, first_before_others, shared, sums_later, world
from drafttrain.train.callbacks import StepEnd
from drafttrain.train.full_disk import CheckpointFile, could_be_written
from drafttrain.train.module import StepModule
from drafttrain.train.settings import TrainSettings
from drafttrain.train.strategy import whole

UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError),
    *(RuntimeError, EOFError, ValueError, KeyError),
)
"""What readers raise of a file whose content is none of a checkpoint."""


class Checkpoints(StepEnd):
    """Saves what a resume needs every N steps, keeps the last two, and stops with a checkpoint when asked to by a signal."""

    phase = "checkpoint"
    KEPT = 2

    def __init__(self, folder: Path, *, settings: TrainSettings) -> None:
        self.folder = folder
        self.settings = settings
        self.file = CheckpointFile()
        """The trainer writes through this."""
        self._asked_to_stop = False
        self._asked_before: Callable[[], list[float]] = lambda: [0]
        """How many processes had been asked by the end of the step before."""

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
        stops = self._stops(step)
        if step % self.settings.checkpoint_every_steps == 0 or stops:
            self.save(trainer, step)
        if stops:
            raise Interrupted(f"stopped at step {step} of {self.settings.max_steps}: run the same command to continue")

    def _stops(self, step: int) -> bool:
        """Return whether any process was asked to stop, the same on all of them.

        Several processes hear of each other one step later, so that none waits; at the last step there is no later one.
        """
        asked = sums_later([self._asked_to_stop])
        known = self._asked_before()[0] > 0
        self._asked_before = asked
        if world().size == 1 or step == self.settings.max_steps:
            return known or asked()[0] > 0
        return known

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
    """Return the newest checkpoint that is as it was written; damaged ones are set aside and named."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        if damage := _damage(path):
            say(f"{path} is damaged ({damage}): falling back to the checkpoint before it")
            path.rename(path.with_suffix(".damaged"))
            continue
        return path
    return None


def _damage(path: Path) -> str:
    """Return what is wrong with a checkpoint; empty: every part of it is as it was written, and torch can read it.

    Raises:
        OSError: It cannot be read for another reason than its content or its disk.
        RuntimeError: There is no memory left to look; that is no damage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look whether the numbers are those that were written.
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
    """Return the step of a checkpoint and the weights of what it trains, whatever layout wrote it."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "trained."
    weights = {
        name.removeprefix(prefix): value for name, value in stored["state_dict"].items() if name.startswith(prefix)
    }
    return int(stored["global_step"]), weights
