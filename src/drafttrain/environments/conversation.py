"""A worker that stays: it starts its engine once and answers requests until it is closed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafttrain.core.files import write_json
from drafttrain.distributed.world import for_own_program
from drafttrain.environments.environment import LAST_LINES, RUNNER, EngineError, Environment, check_installed, python_of

CLOSE_SECONDS = 30.0


class Conversation:
    """A worker's process. It ends with `close`, and with the object.

    Args:
        worker: A Python file with a function `start(request)` that returns the function from a request to its answer; it cannot
            import drafttrain.

    Raises:
        EngineError: The environment is not installed, or the worker failed to start; the message ends with its last log lines.
    """

    def __init__(self, environment: Environment, worker: Path, request: Mapping[str, Any]) -> None:
        check_installed(environment)
        self._name = environment.name
        self._held = contextlib.ExitStack()
        self.folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="drafttrain-")))
        """A folder for files of both sides; removed with the conversation."""
        write_json(self.folder / "request.json", dict(request))
        self._log = self.folder / "log.txt"
        with self._log.open("w", encoding="utf-8") as written:
            self._process = subprocess.Popen(
                # -I: the worker sees the packages of its own environment only.
                [*map(str, (python_of(environment), "-I", RUNNER, worker, self.folder / "request.json"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                cwd=self.folder,
                text=True,
                encoding="utf-8",
                env=for_own_program(os.environ),
            )
        self.close = weakref.finalize(self, _end, self._process, self._held)
        """Ends the process and removes the folder."""
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            EngineError: The worker failed; the message ends with its last log lines.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        # Without an answer the process ends, and its log is complete then.
        code = None if line else self._process.wait()
        last = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        if code is not None:
            raise EngineError(f"{self._name} stopped with exit code {code} and no answer:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self._name} failed: {answer['error']}\n{last}")
        return answer


def _end(process: subprocess.Popen[str], held: contextlib.ExitStack) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    held.close()
