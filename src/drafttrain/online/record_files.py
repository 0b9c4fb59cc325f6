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
from drafttrain.online.capture import Capture


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

    def close(self) -> None:
        """Write what waits, and stop."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()
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
            try:
                lines.append(self._line(capture))
            except Refused as reason:
                self.dropped[reason.kind] += 1
            except Exception:
                # What passes is anybody's, and whatever it does must not end the thread.
                self.dropped["unreadable"] += 1
            if self._size + sum(map(len, lines)) >= self._rotate_bytes:
                self._commit(lines)
                lines = []
        self._commit(lines)

    def _commit(self, lines: list[bytes]) -> None:
        """Write lines, and count them as written when the disk has confirmed them."""
        if not lines:
            return
        try:
            handle = self._opened()
            for line in lines:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except OSError:
            # A full disk, or one that is gone: the lines are taken back, and the next ones try a file of their own.
            self.dropped["disk"] += len(lines)
            self._take_back()
            return
        if os.fstat(handle).st_nlink == 0:
            # Somebody removed the file meanwhile, and the lines with it.
            self._close_file()
            self._commit(lines)
            return
        self._size += sum(map(len, lines))
        self.written += len(lines)
        if self._size >= self._rotate_bytes:
            self._close_file()

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
