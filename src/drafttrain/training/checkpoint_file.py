"""A checkpoint is one file, written by a thread while training continues."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from drafttrain.core.errors import DrafttrainError

PIECE_BYTES = 64 * 2**20
"""Bytes after which the disk must confirm the data (fsync), to distinguish a slow disk from a stalled one."""


class CheckpointFile(CheckpointIO):
    """Writes one checkpoint at a time under a temporary name, and renames it when it is on the disk.

    Lightning's AsyncCheckpointIO clones on the device, queues any number of checkpoints, and reports an error at a later save.

    Args:
        stall_seconds: A disk that takes nothing for as long is given up.
        written: Called in the thread after a checkpoint is at its place.
    """

    def __init__(self, *, stall_seconds: float, written: Callable[[], None] = lambda: None) -> None:
        self.copies = True
        """Whether `save_checkpoint` copies first. If not, the tensors must not change until it is `finished`."""
        self._stall_seconds = stall_seconds
        self._written = written
        self._path = Path()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._num_bytes = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Start to write a checkpoint; the previous one must be finished."""
        self.write(on_host(checkpoint) if self.copies else checkpoint, path)

    def write(self, checkpoint: Any, path: Any) -> None:
        """Start to write a checkpoint whose tensors are not shared."""
        assert self._thread is None, "the checkpoint before this one is finished first"
        self._path, self._num_bytes = Path(path), 0
        self._thread = threading.Thread(target=self._run, args=(checkpoint,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether writing the current checkpoint has failed so far."""
        return self._failure is not None

    def finished(self) -> Exception | None:
        """Wait until the current checkpoint is on the disk; return the error if it could not be written.

        Raises:
            DrafttrainError: The disk takes nothing any more.
        """
        thread = self._thread
        while thread is not None and thread.is_alive():
            before = self._num_bytes
            thread.join(self._stall_seconds)
            if thread.is_alive() and self._num_bytes == before:
                self._thread = None
                raise DrafttrainError(
                    f"{self._path}: the disk accepted no data for {self._stall_seconds:g} s (train.timeout_seconds), after "
                    f"{before / 1e9:.2f} GB of this checkpoint"
                )
        failure, self._failure, self._thread = self._failure, None, None
        return failure

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint to the CPU."""
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)

    def _run(self, checkpoint: Any) -> None:
        temporary = self._path.with_suffix(".part")
        try:
            with temporary.open("wb") as file:
                _save(checkpoint, _Confirmed(file, self._count))
            os.replace(temporary, self._path)
            self._written()
        except Exception as error:  # returned to the training, which handles it
            temporary.unlink(missing_ok=True)
            self._failure = error

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes


class _Confirmed:
    """A file that is flushed to the disk piece by piece, not only to the system's cache."""

    def __init__(self, file: Any, count: Callable[[int], None]) -> None:
        self._file = file
        self._count = count
        self._unconfirmed = 0

    def write(self, data: Any) -> int:
        """Write all bytes."""
        whole = memoryview(data)
        for start in range(0, len(whole), PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES]
            self._file.write(piece)
            self._unconfirmed += len(piece)
            if self._unconfirmed >= PIECE_BYTES:
                self.flush()
        return len(whole)

    def flush(self) -> None:
        """Flush the written bytes to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._count(self._unconfirmed)
        self._unconfirmed = 0


def _save(checkpoint: Any, file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's writer continues after the file's error, and then fails on its own byte count.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    file.flush()


def on_host(value: Any) -> Any:
    """Return a copy of a checkpoint in host memory; shared tensors (tied weights) stay shared."""
    return _copied(value, {})


def _copied(value: Any, copies: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if not value.numel() or place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(value, dict):
        return {key: _copied(part, copies) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part, copies) for part in value)
    return value
