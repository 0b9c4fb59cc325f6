"""Makes lines of captures in a process of its own: looking through a long answer would hold the interpreter that passes tokens on."""

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
"""A message: L(ine), R(efused) or C(apture), its bytes, and they follow."""
NICE = 5
LONGEST_SECONDS = 120.0
"""A line that takes longer is given up; the longest answers take some seconds."""


class LineWorker:
    """Hands captures to the process and returns their lines; a process that died, or does not come to an end, is started again.

    Args:
        redact: Take out what `redaction` knows.
        redact_with: Dotted name of the user's function.
        record_bytes: What a capture may have unpacked.
        folder: Of the records, whose salt makes pseudonyms of users; None: who asked is left out.
    """

    def __init__(
        self,
        *,
        redact: bool,
        redact_with: str | None,
        record_bytes: int = RECORD_BYTES,
        folder: Path | None = None,
        longest_seconds: float = LONGEST_SECONDS,
    ) -> None:
        self.longest_seconds = longest_seconds
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
            Refused: It must not, or cannot, be kept.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, b"C", pickle.dumps(capture))
            if not _answers(self._process.stdout, self.longest_seconds):
                self._process.kill()
            tag, answer = _receive(self._process.stdout)
        except (OSError, EOFError) as error:
            self.close()
            raise Refused("unreadable", "the process that makes lines died of it") from error
        if tag == b"R":
            raise Refused(answer.decode(), "see the kinds of docs/serving_logs.md")
        return answer

    def start(self) -> None:
        """Start the process, where it does not run."""
        if self._process is None:
            self._process = self._started()

    def interrupt(self) -> None:
        """Give up the line that is made, from another thread."""
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
        # The user's function is found where this process would find it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", __name__, self._settings]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def main() -> None:
    """Answer captures on the standard input until it ends, as it does when the recorder is killed."""
    # Who stops all processes of a service at once means the recorder, which has this one write what waits.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    settings = json.loads(sys.argv[1])
    record_bytes = settings.pop("record_bytes")
    folder = settings.pop("folder")
    # The arguments of a process are everybody's to read: the salt is read here.
    pseudonyms = Pseudonyms(Path(folder)) if folder else None
    redact = redactor(**settings) if settings["builtin"] or settings["own"] else None
    # What the user's function prints must not stand between the answers.
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
            # What passes is anybody's, and whatever it does must not end the process.
            _send(answers, b"R", b"unreadable")


def _send(pipe: IO[bytes], tag: bytes, message: bytes) -> None:
    pipe.write(SIZE.pack(tag, len(message)))
    pipe.write(message)
    pipe.flush()


def _answers(pipe: IO[bytes], seconds: float) -> bool:
    """Tell whether there is something to read, or an end, within some seconds."""
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
