"""Writes records without delaying requests: a thread, a bounded queue, and counts of dropped records."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from drafttrain.core.files import sync_folder
from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.recorder.capture import Capture

FLUSH_SECONDS = 1.0
"""For the last write after the time limit."""


class RecordFiles:
    """Files of records in a folder. A line counts as written once it is on disk.

    Args:
        line: Returns the line of a capture, or raises `Refused`.
        rotate_bytes: A larger file is closed, and the next one is opened.
        queue_bytes: Maximum bytes of captures that wait.
    """

    def __init__(self, folder: Path, line: Callable[[Capture], bytes], *, rotate_bytes: int, queue_bytes: int) -> None:
        self.folder = folder
        self.written = 0
        self.dropped = Counter[str]()
        self.file = ""
        self._line = line
        self._rotate_bytes = rotate_bytes
        self._queue_bytes = queue_bytes
        self._queue: deque[Capture] = deque()
        self._queued_bytes = 0
        self._handle: int | None = None
        self._size = 0
        self._number = 0
        self._change = threading.Condition()
        self._closing = False
        self._gives_up = False
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)

    def start(self) -> None:
        """Start the writing thread."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def offer(self, capture: Capture) -> None:
        """Queue a capture, or drop it if the queue is full. Never waits for the disk."""
        with self._change:
            if self._queued_bytes + capture.size > self._queue_bytes or self._closing:
                self.dropped["slow"] += 1
                return
            self._queue.append(capture)
            self._queued_bytes += capture.size
            self._change.notify()

    def close(self, *, within_seconds: float | None = None, interrupt: Callable[[], None] = lambda: None) -> None:
        """Write the captures that wait, and stop.

        Args:
            within_seconds: Captures that are not written by then are dropped; None: all are written.
            interrupt: Stops the making of the current line.
        """
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(within_seconds)
        if self._thread.is_alive():
            self._gives_up = True
            interrupt()
            self._thread.join(FLUSH_SECONDS)
        if not self._thread.is_alive():
            self._close_file()

    @property
    def queued(self) -> int:
        """Number of captures that wait."""
        return len(self._queue)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._closing:
                    self._change.wait()
                captures = list(self._queue)
                self._queue.clear()
            if not captures:
                return
            self._write(captures)
            with self._change:
                self._queued_bytes -= sum(capture.size for capture in captures)

    def _write(self, captures: list[Capture]) -> None:
        """Write some captures, with one write per file."""
        lines: list[bytes] = []
        for capture in captures:
            if self._gives_up:
                self.dropped["stopped"] += 1
                continue
            try:
                lines.append(self._line(capture))
            except Refused as reason:
                self.dropped["stopped" if self._gives_up else reason.kind] += 1
            except Exception:
                # Captures are untrusted: none of them may end the thread.
                self.dropped["unreadable"] += 1
            if self._size + sum(map(len, lines)) >= self._rotate_bytes:
                self._commit(lines)
                lines = []
        self._commit(lines)

    def _commit(self, lines: list[bytes]) -> None:
        """Write lines, and count them as written when they are on disk."""
        while lines:
            count = self._appended(lines)
            if count == len(lines):
                return
            # The disk is full or gone: the line that failed is dropped, and the next ones go to a new file.
            self.dropped["disk"] += 1
            lines = lines[count + 1 :]
            self._close_file()

    def _appended(self, lines: list[bytes]) -> int:
        """Append lines, and return how many of them are on disk."""
        count = 0
        try:
            handle = self._opened()
            end = self._size
            try:
                for line in lines:
                    _write_fully(handle, line)
                    end += len(line)
                    count += 1
            except OSError:
                # Remove the part of the line that was written.
                os.ftruncate(handle, end)
            os.fsync(handle)
            removed = os.fstat(handle).st_nlink == 0
        except OSError:
            self._discard_uncommitted()
            return 0
        if removed:
            # Another process removed the file, and the lines with it.
            self._close_file()
            return self._appended(lines)
        self._size = end
        self.written += count
        if end == 0:
            self._discard_uncommitted()
        elif self._size >= self._rotate_bytes:
            self._close_file()
        return count

    def _opened(self) -> int:
        """Return the file to append to: a new one if there is none, or if the name of the last one belongs to another file now."""
        if self._handle is not None and not self._is_there(self._handle):
            self._close_file()
        while self._handle is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._number += 1
            began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            self.file = f"records-{began}-{os.getpid()}-{self._number:06d}.jsonl"
            # Two recorders in two containers may have the same process id.
            with contextlib.suppress(FileExistsError):
                # Append: log rotation may copy and truncate the file.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
                self._handle = os.open(self.folder / self.file, flags, 0o600)
                sync_folder(self.folder)
        self._size = os.fstat(self._handle).st_size
        return self._handle

    def _is_there(self, handle: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.folder / self.file), os.fstat(handle))
        return False

    def _discard_uncommitted(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
                if self._size == 0:
                    # While the disk is full, each record would leave another empty file.
                    (self.folder / self.file).unlink()
            self._close_file()

    def _close_file(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)  # Everything that counts as written is on disk.
            self._handle, self._size = None, 0


def _write_fully(handle: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(handle, rest) :]
