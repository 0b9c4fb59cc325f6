"""Checks before several processes train together. They take seconds and report rank and host."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from importlib import metadata
from pathlib import Path

import drafttrain
from drafttrain.core.console import say
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.files import write_text
from drafttrain.distributed.collectives import agree, first_before_others, report_world, shared
from drafttrain.distributed.world import is_first, world
from drafttrain.training.host_memory import free_host_bytes
from drafttrain.training.settings import TrainSettings

PACKAGES = ("torch", "lightning", "deepspeed", "transformers", "peft", "numpy")
BYTES_A_PARAMETER = 12
"""Bytes of a checkpoint per parameter: a float32 weight and Adam's two moments."""
REPORTED_BYTES = 10**8


def check_processes(name: str, recipe: str, folder: Path, settings: TrainSettings) -> None:
    """Require the same versions, code and recipe on all processes, and a shared folder.

    Raises:
        DrafttrainError: Processes differ; each one that differs is named with its host.
    """
    here = world()
    report_world()
    agree("the number of processes", here.size)
    versions = [f"{package} {metadata.version(package)}" for package in PACKAGES]
    agree("the versions of the packages", ", ".join(versions))
    agree("drafttrain's source (digest)", source_digest())
    agree(f"the recipe {name} (digest)", hashlib.sha256(recipe.encode()).hexdigest()[:12])
    phases = {"train": settings, "train.pretrain": settings.of_pretraining() if settings.pretrain else None}
    for section, phase in phases.items():
        if phase is not None:
            say_shares(section, phase, world_size=here.size)
    _check_folder(folder)


def say_shares(section: str, settings: TrainSettings, *, world_size: int) -> None:
    """Log how a step is divided, and how many processes have no records in it."""
    count, most = settings.num_micro_batches(world_size), settings.largest_micro_batch(world_size)
    idle = max(0, world_size - settings.batch_size)
    nothing = f"; {idle} processes have none" if idle else ""
    say(
        f"{section}: {settings.batch_size} records per step, at most {most} per process at once, "
        f"{count} micro-batch{'es' if count > 1 else ''}{nothing}"
    )


def _check_folder(folder: Path) -> None:
    """Require that all processes see the files of the first one."""
    mark = folder / ".same_folder"
    token = str(shared(uuid.uuid4().hex)[0])
    with first_before_others("it marks the run folder"):
        if is_first():
            write_text(mark, token)
        seen = mark.exists() and mark.read_text(encoding="utf-8") == token
    answers = shared([seen, f"rank {world().rank} on {os.uname().nodename}"])
    if is_first():
        mark.unlink(missing_ok=True)
    blind = [who for sees, who in answers if not sees]
    if blind:
        raise DrafttrainError(
            f"{folder.absolute()}: {', '.join(blind)} cannot see the files of rank 0 here. Put runs on a disk that all hosts "
            "share (--runs DIR)"
        )


def check_disk(folder: Path, *, num_trained: int, keep: int) -> None:
    """Require room for the checkpoints of a run, in addition to those that it has already, and report their size.

    Args:
        keep: Checkpoints that are kept. While the next one is written, there is one more.

    Raises:
        DrafttrainError: With the bytes that are needed and free.
    """
    there = min(keep, len(list(folder.glob("step-*.ckpt"))))
    size = num_trained * BYTES_A_PARAMETER
    needed = size * (keep + 1 - there)
    free = shutil.disk_usage(folder).free
    if size >= REPORTED_BYTES:
        say(
            f"checkpoints: up to {size / 1e9:.1f} GB each (trained weights and their optimizer's state), the last {keep} "
            "are kept (train.keep_checkpoints)"
        )
    if free < needed:
        raise DrafttrainError(
            f"{folder}: checkpoints of {num_trained:,} trained parameters need {needed / 1e9:.2f} GB "
            f"({keep + 1} at once, {there} are there), {free / 1e9:.2f} GB are free: make room, or put runs elsewhere (--runs DIR)"
        )


def has_room_for_a_copy(num_trained: int) -> bool:
    """Return whether the first process has memory for a copy of a checkpoint, to be written while training continues."""
    size = num_trained * BYTES_A_PARAMETER
    free = shared(free_host_bytes())[0]
    if free is not None and free < size:
        say(
            f"checkpoints: {size / 1e9:.2f} GB each, and {free / 1e9:.2f} GB of host memory are free: no room for a copy, so "
            "training waits while one is written"
        )
        return False
    return True


def source_digest() -> str:
    """Return a short digest of the source that this process runs."""
    root = Path(drafttrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
