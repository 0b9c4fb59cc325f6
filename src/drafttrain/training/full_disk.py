"""What is done where the disk has no room for what a training keeps."""

from __future__ import annotations

import errno
import os

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.collectives import shared
from drafttrain.training.settings import TrainSettings

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, quota used up, larger than files may be."""


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
