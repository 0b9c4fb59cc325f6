"""Makes log lines in a separate process: redacting a long answer would block the interpreter that relays tokens."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO

from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.data_gen.serving_logs.pseudonyms import Pseudonyms
from drafttrain.data_gen.serving_logs.redaction import redactor
from drafttrain.recorder.capture import Capture, line_of
from drafttrain.recorder.settings import RECORD_BYTES

SIZE = struct.Struct(">cQ")
"""Header of a message: L(ine), R(efused) or C(apture), and the number of bytes that follow."""
NICE = 5
MAX_SECONDS = 120.0
"""A line that takes longer is dropped. The longest answers take a few seconds."""


class LineWorker:
    """Sends captures to the process and returns their lines. A process that died or hangs is started again.

    Args:
        redact: Use the built-in redaction.
        redact_with: Dotted name of the user's function.
        record_bytes: Maximum bytes of a capture, decompressed.
        folder: Folder of the records, which holds the salt for pseudonyms; None: users are not logged.
    """

    def __init__(
        self,
        *,
        redact: bool,
        redact_with: str | None,
        record_bytes: int = RECORD_BYTES,
        folder: Path | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self.max_seconds = max_seconds
        self._settings = json.dumps(
            {
                "builtin": redact,
                "own": redact_with,
                "record_bytes": record_bytes,
                "folder": str(folder) if folder else None,
            }
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, capture: Capture) -> bytes:
        """Return the line of a capture.

        Raises:
            Refused: It cannot be recorded.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, b"C", pickle.dumps(capture))
            if not _has_data(self._process.stdout, self.max_seconds):
                self._process.kill()
            tag, answer = _receive(self._process.stdout)
        except (OSError, EOFError) as error:
            self.close()
            raise Refused("unreadable", "the line worker died") from error
        if tag == b"R":
            raise Refused(answer.decode(), "see the kinds in docs/serving_logs.md")
        return answer

    def start(self) -> None:
        """Start the process if it is not running."""
        if self._process is None:
            self._process = self._started()

    def interrupt(self) -> None:
        """Give up the current line; called from another thread."""
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process.wait()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        # The worker has to find the user's function where this process would.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", __name__, self._settings]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def main() -> None:
    """Read captures from standard input until it ends, which it also does if the recorder is killed."""
    # A signal to the whole process group is meant for the recorder, which still needs this worker for the lines that wait.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    settings = json.loads(sys.argv[1])
    record_bytes = settings.pop("record_bytes")
    folder = settings.pop("folder")
    # Other users can read the arguments of a process, so the salt is read from its file.
    pseudonyms = Pseudonyms(Path(folder)) if folder else None
    redact = redactor(**settings) if settings["builtin"] or settings["own"] else None
    # Output of the user's function must not end up between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            _, message = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(
                answers, b"L", line_of(pickle.loads(message), redact, record_bytes=record_bytes, pseudonyms=pseudonyms)
            )
        except Refused as reason:
            _send(answers, b"R", reason.kind.encode())
        except Exception:
            # Captures are untrusted: none of them may end the process.
            _send(answers, b"R", b"unreadable")


def _send(pipe: IO[bytes], tag: bytes, message: bytes) -> None:
    pipe.write(SIZE.pack(tag, len(message)))
    pipe.write(message)
    pipe.flush()


def _has_data(pipe: IO[bytes], seconds: float) -> bool:
    """Return whether data, or the end of the pipe, arrives in time."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _receive(pipe: IO[bytes]) -> tuple[bytes, bytes]:
    head = pipe.read(SIZE.size)
    if len(head) < SIZE.size:
        raise EOFError
    tag, size = SIZE.unpack(head)
    message = pipe.read(size)
    if len(message) < size:
        raise EOFError
    return tag, message


if __name__ == "__main__":
    main()
