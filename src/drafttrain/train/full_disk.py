"""Checkpoints as one file each, and what is done where the disk has no room for them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.processes import shared
from drafttrain.train.settings import TrainSettings

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, quota used up, larger than files may be."""


class CheckpointFile(CheckpointIO):
    """Writes a checkpoint straight to its place; Lightning's own way goes through memory and the folder of temporary files.

    One process writes while the others wait, so a full disk is noted here, for all of them to hear of afterwards.
    """

    def __init__(self) -> None:
        self.failure: OSError | None = None
        """Why the last file could not be written."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write it to the disk, not only to the system's cache."""
        self.failure = None
        try:
            with Path(path).open("wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            Path(path).unlink(missing_ok=True)
            self.failure = only_full(error)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read it on the CPU."""
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it."""
        Path(path).unlink(missing_ok=True)


def _save(checkpoint: Any, file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's writer goes on after the file's error and stumbles over its own count of bytes.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def only_full(error: OSError) -> OSError:
    """Return an error that says that the disk is full; raise any other.

    Writers of other languages give no number, but its text.
    """
    if error.errno in FULL or any(os.strerror(number) in str(error) for number in FULL):
        return error
    raise error


def could_be_written(what: str, failure: OSError | None, *, settings: TrainSettings, instead: str) -> bool:
    """Tell all processes whether the first one could write; it alone knows.

    Args:
        instead: What there is in its place.

    Raises:
        DrafttrainError: It could not, and the recipe does not say to go on.
    """
    reason = shared(None if failure is None else failure.strerror or str(failure))[0]
    if reason is None:
        return True
    said = f"no room for {what} ({reason}); {instead}"
    if settings.on_full_disk == "continue":
        say(f"{said}. Going on without it (train.on_full_disk: continue)")
        return False
    raise DrafttrainError(
        f"{said}. Make room and run the same command to continue, or let the run go on with train.on_full_disk=continue"
    )
