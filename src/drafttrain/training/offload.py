"""The optimizer for offloaded states, and the operator that must be built for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError

STALE_SECONDS = 1800.0
"""A build that has written nothing for this long is dead."""


def cpu_adam(groups: Iterable[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW on the CPU, building its operator the first time.

    Raises:
        DrafttrainError: A build that was killed has left its lock, which the next one would wait for without end.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = build_folder(CPUAdamBuilder.NAME)
    refuse_stale_lock(folder)
    if not list(folder.glob("*.so")):
        say(f"offload: building DeepSpeed's {CPUAdamBuilder.NAME} in {folder}, once; this takes minutes")
    made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return made


def build_folder(name: str) -> Path:
    """Return where torch builds an extension of this name."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))


def refuse_stale_lock(folder: Path) -> None:
    """Refuse to wait for a dead build.

    Raises:
        DrafttrainError: The lock is old; the message names it.
    """
    lock = folder / "lock"
    if not lock.exists():
        return
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    quiet = time.time() - newest
    if quiet > STALE_SECONDS:
        raise DrafttrainError(
            f"{lock}: the lock of a build that wrote nothing for {quiet / 60:.0f} minutes: one that was killed. "
            "If no build is running, remove this file and start again."
        )
    say(f"{lock}: another process builds this operator. Waiting for it")
