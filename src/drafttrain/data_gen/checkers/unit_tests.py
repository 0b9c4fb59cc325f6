"""Programs: whether a generated program passes its unit tests, run in a sandboxed process. POSIX only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.checkers import checkers
from drafttrain.data_gen.names import problem_of

FENCED = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)

FENCE = """
import ctypes, resource, sys
seconds, memory, size = map(int, sys.argv[1:4])
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
unshare = ctypes.CDLL(None, use_errno=True).unshare
if unshare(CLONE_NEWNET) and unshare(CLONE_NEWUSER | CLONE_NEWNET):
    sys.exit(97)  # cannot be cut off from the network: do not run
for what, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", size), ("NOFILE", 16), ("CORE", 0)):
    number = getattr(resource, "RLIMIT_" + what)
    resource.setrlimit(number, (limit, limit))
source = sys.stdin.read()
exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
"""
"""Runs in the child: removes the network, limits time, memory and file size, then runs the program and its tests."""

NO_FENCE = 97


@dataclass
class UnitTestsSettings:
    """Unit tests by problem. Runs programs that a model wrote on this machine."""

    path: str = setting(help="JSON lines: id, and tests: Python that raises an exception on failure.")
    allow_code_execution: bool = setting(False, help="Must be true: programs that a model wrote are run here.")
    timeout_seconds: int = setting(5, help="Time limit of a program.", ge=1)
    memory_mb: int = setting(512, help="Memory limit of a program.", ge=32)
    file_mb: int = setting(1, help="Largest file that a program may write; its folder is removed afterwards.", ge=0)

    def check(self) -> list[str]:
        """Return problems between fields."""
        if not self.allow_code_execution:
            return ["allow_code_execution: must be true: this checker runs programs that a model wrote on this machine"]
        return []


@checkers.register("unit_tests", UnitTestsSettings)
class UnitTests:
    """The answer of a program is whether it passes.

    The sandbox guards against accidents of generated code, not against an attacker: a program can still read and delete what
    its user can. For text of unknown origin use a separate machine.
    """

    def __init__(self, settings: UnitTestsSettings) -> None:
        if not settings.allow_code_execution:
            raise DataError("checker unit_tests: allow_code_execution is false, so nothing is run")
        self.settings = settings
        if not self._passes("import json, math, re, collections"):
            raise DataError(
                "checker unit_tests: a program that only imports from the standard library does not run here"
            )

    @cached_property
    def tests(self) -> dict[str, str]:
        """Tests by the id of the problem."""
        path = Path(self.settings.path).expanduser()
        if not path.is_file():
            raise DataError(f"{path}: no such file of unit tests (JSON lines)")
        # Split at \n only: a program or an id may hold other line separators.
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        return {str(line["id"]): line["tests"] for line in lines}

    def answer(self, text: str, *, id: str) -> bool:
        """Return whether the program in a text (its first fenced block, or all of it) passes."""
        problem = id if id in self.tests else problem_of(id)
        if problem not in self.tests:
            raise DataError(f"{self.settings.path}: no tests for {problem!r}")
        fenced = FENCED.search(text)
        return self._passes(f"{fenced.group(1) if fenced else text}\n\n{self.tests[problem]}\n")

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        """Return whether the program passes; no reference is needed."""
        return self.answer(text, id=id)

    def _passes(self, source: str) -> bool:
        limits = [self.settings.timeout_seconds, self.settings.memory_mb << 20, self.settings.file_mb << 20]
        with tempfile.TemporaryDirectory(prefix="drafttrain-check-") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", FENCE, *map(str, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                process.communicate(source, timeout=self.settings.timeout_seconds + 1)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == NO_FENCE:
            raise DataError(
                "checker unit_tests: this system cannot give a process its own network namespace, so programs are not run"
            )
        return process.returncode == 0
