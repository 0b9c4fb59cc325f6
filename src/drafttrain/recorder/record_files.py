"""Writes records beside the requests, never in their way: a thread, a bounded queue, and a count of what had to be dropped."""

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
"""For the last write, where time to stop is over."""


class RecordFiles:
    """Files of records in a folder; a line counts as written once it is on the disk.

    Args:
        line: Makes the line of a capture, or raises `Refused`.
        rotate_bytes: A larger file is closed and the next one begun.
        queue_bytes: Captures that may wait.
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
        self._thread = threading.Thread(target=self._write_on, name="records", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def offer(self, capture: Capture) -> None:
        """Take a capture to be written, or drop it: never waits for the disk."""
        with self._change:
            if self._queued_bytes + capture.size > self._queue_bytes or self._closing:
                self.dropped["slow"] += 1
                return
            self._queue.append(capture)
            self._queued_bytes += capture.size
            self._change.notify()

    def close(self, *, within_seconds: float | None = None, interrupt: Callable[[], None] = lambda: None) -> None:
        """Write what waits, and stop.

        Args:
            within_seconds: What is not written by then is dropped; None: all is written.
            interrupt: Gives up the line that is being made.
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
        """Captures that wait."""
        return len(self._queue)

    def _write_on(self) -> None:
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
        """Write some captures, those of a file together."""
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
                # What passes is anybody's, and whatever it does must not end the thread.
                self.dropped["unreadable"] += 1
            if self._size + sum(map(len, lines)) >= self._rotate_bytes:
                self._commit(lines)
                lines = []
        self._commit(lines)

    def _commit(self, lines: list[bytes]) -> None:
        """Write lines, and count them as written when the disk has confirmed them."""
        while lines:
            count = self._appended(lines)
            if count == len(lines):
                return
            # A full disk, or one that is gone: what did not fit is dropped, and the next lines try a file of their own.
            self.dropped["disk"] += 1
            lines = lines[count + 1 :]
            self._close_file()

    def _appended(self, lines: list[bytes]) -> int:
        """Return how many lines, of the first ones, are on the disk."""
        count = 0
        try:
            handle = self._opened()
            end = self._size
            try:
                for line in lines:
                    _write_whole(handle, line)
                    end += len(line)
                    count += 1
            except OSError:
                # The part of a line that did fit is none.
                os.ftruncate(handle, end)
            os.fsync(handle)
            removed = os.fstat(handle).st_nlink == 0
        except OSError:
            self._take_back()
            return 0
        if removed:
            # Somebody removed the file meanwhile, and the lines with it.
            self._close_file()
            return self._appended(lines)
        self._size = end
        self.written += count
        if end == 0:
            self._take_back()
        elif self._size >= self._rotate_bytes:
            self._close_file()
        return count

    def _opened(self) -> int:
        """Return the file to write on in: a new one where there is none, or where the last one's name means another by now."""
        if self._handle is not None and not self._is_there(self._handle):
            self._close_file()
        while self._handle is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._number += 1
            began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            self.file = f"records-{began}-{os.getpid()}-{self._number:06d}.jsonl"
            # In two containers two recorders may be the same process.
            with contextlib.suppress(FileExistsError):
                # Behind its end, wherever that is: somebody may copy and cut it.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
                self._handle = os.open(self.folder / self.file, flags, 0o600)
                sync_folder(self.folder)
        self._size = os.fstat(self._handle).st_size
        return self._handle

    def _is_there(self, handle: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.folder / self.file), os.fstat(handle))
        return False

    def _take_back(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
                if self._size == 0:
                    # As long as the disk is full there would be one more for each record.
                    (self.folder / self.file).unlink()
            self._close_file()

    def _close_file(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)  # All that counts is on the disk.
            self._handle, self._size = None, 0


def _write_whole(handle: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(handle, rest) :]
