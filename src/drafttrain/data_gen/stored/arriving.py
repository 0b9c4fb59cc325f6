"""Shards of a cache that another process is still writing: a reader waits for those that it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from drafttrain.core.console import say
from drafttrain.core.errors import DataError
from drafttrain.data_gen.stored.shard_files import ShardFiles

LOOK_EVERY_SECONDS = 0.1
SAY_EVERY_SECONDS = 30.0


class Arriving:
    """A shard is there when its note is: the note is written after the arrays, and names them with their checksums.

    Args:
        ended: Returns why no further shard will come; None: the writer is at work.
    """

    def __init__(self, ended: Callable[[], str | None]) -> None:
        self._ended = ended
        self._said = -SAY_EVERY_SECONDS
        self.missing = 0
        """Shards that were not there when the reader was opened."""

    def wait(self, files: ShardFiles, names: Iterable[str]) -> None:
        """Return when a shard has these arrays.

        Raises:
            DataError: It has not, and its writer has ended.
        """
        names = list(names)
        while True:
            # Asked first: what the writer wrote before it ended is there.
            why = self._ended()
            if files.holds(names):
                return
            if why is not None:
                raise DataError(
                    f"{files.folder}: training needs shard {files.number} of the cached target outputs, and {why}"
                )
            if time.monotonic() - self._said >= SAY_EVERY_SECONDS:
                self._said = time.monotonic()
                say(
                    f"training waits for shard {files.number} of the cached target outputs, which another process writes"
                )
            time.sleep(LOOK_EVERY_SECONDS)
