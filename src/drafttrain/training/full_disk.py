"""How a training handles a full disk."""

from __future__ import annotations

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.collectives import shared
from drafttrain.training.settings import TrainSettings


def could_be_written(what: str, failure: OSError | None, *, settings: TrainSettings, instead: str) -> bool:
    """Return on all processes whether the first one could write.

    Args:
        instead: What is still there, for the message.

    Raises:
        DrafttrainError: It could not, and train.on_full_disk is stop.
    """
    reason = shared(None if failure is None else failure.strerror or str(failure))[0]
    if reason is None:
        return True
    problem = f"no room for {what} ({reason}); {instead}"
    if settings.on_full_disk == "continue":
        say(f"{problem}. Continuing without it (train.on_full_disk: continue)")
        return False
    raise DrafttrainError(
        f"{problem}. Make room and run the same command to continue, or continue without it with train.on_full_disk=continue"
    )
