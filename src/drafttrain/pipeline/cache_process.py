"""A process that writes the cached target outputs of a run while another one trains on the shards that are there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from drafttrain.core.console import say
from drafttrain.core.errors import DataError
from drafttrain.distributed.world import without_launcher, world

WRITER = "drafttrain.commands.write_cache"


class CacheProcess:
    """Writes the cache of a run folder. It ends with `close`, and when this process is gone, which closes its input."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._why: str | None = None

    def start(self) -> None:
        """Start it.

        Raises:
            DataError: Several processes train. One that waits for a shard would keep the others in a collective, and only the process
                that started the writer can see that it failed.
        """
        if world().size > 1:
            raise DataError(
                "data.cache_while_training: several processes train: write the cache first (set it to false)"
            )
        say("another process writes the cached target outputs; training begins with the first shards")
        # A plugin that this process can import, the new one can import too.
        environment = without_launcher(os.environ) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", WRITER, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            # An interrupt of the terminal is for the training, which writes a checkpoint first. The closed input ends the writer.
            start_new_session=True,
        )

    def ended(self) -> str | None:
        """Return why it writes no further shard; None: it is at work, or another process started it."""
        if self._why is None and self._process is not None and (code := self._process.poll()) is not None:
            assert self._process.stdout is not None
            reason = self._process.stdout.read().strip() or f"exit code {code}"
            failed = f"the process that writes them failed: {reason}"
            self._why = (
                failed if code else "the process that writes them has ended without it: run the same command again"
            )
        return self._why

    def close(self) -> None:
        """End it, if it still works."""
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None
