"""The command `drafttrain record` as a process, for tests that stop or kill it."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path


class Process:
    """`drafttrain record` in its own process."""

    def __init__(
        self,
        upstream: str,
        out: Path,
        *more: str,
        limit_bytes: int | None = None,
        open_files: tuple[int, int] | None = None,
    ) -> None:
        def limited() -> None:
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            if open_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, open_files)

        command = [
            sys.executable,
            "-m",
            "drafttrain",
            "record",
            "--upstream",
            upstream,
            "--port",
            "0",
            "--out",
            str(out),
            *more,
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limited)
        self.pid = self._process.pid
        assert self._process.stderr is not None
        self.first_line = line = self._process.stderr.readline()
        found = re.search(r"recording on (http://127\.0\.0\.1:\d+) ", line)
        assert found, line + self._process.stderr.read()
        self.address = found.group(1)

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal, and return the exit code and the log since the first line."""
        os.kill(self._process.pid, number)
        log = self._process.communicate(timeout=60)[1]
        return self._process.returncode, log


async def takes_connections(address: str) -> bool:
    """Return whether something listens at an address."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    except ConnectionRefusedError:
        return False
    writer.close()
    return True
