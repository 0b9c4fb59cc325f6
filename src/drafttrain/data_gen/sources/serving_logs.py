"""Logs of a serving stack, read once, as they are now. `recorder.intake` follows logs that are still written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.data_gen.serving_logs.lines import DAMAGED, Line, lines, log_files, opened
from drafttrain.data_gen.serving_logs.reading import Found, LogReader
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.sources import Item, sources, stamps


@sources.register("serving_logs", ServingLogsSettings)
class ServingLogs:
    """The exchanges of all files, in the order of their rotation."""

    def __init__(self, settings: ServingLogsSettings) -> None:
        self.settings = settings
        self._reader = LogReader(settings)

    def items(self) -> Iterator[Item]:
        """Yield every exchange, and the reason for every line or exchange that cannot be used.

        A last line that is still being written is left out; a packed file is not written any more.
        """
        self._reader = LogReader(self.settings)
        max_bytes = int(self.settings.max_line_mb * 2**20)
        for path in log_files(self.settings.path):
            try:
                with opened(path) as file:
                    for number, line in enumerate(lines(file, start=0, max_bytes=max_bytes), start=1):
                        yield from self._items(line, where=f"{path}:{number}", grows=path.suffix != ".gz")
            except DAMAGED:
                yield Item(str(path), "", "damaged: the gzip file is cut off, or is none", private=True)

    def _items(self, line: Line, *, where: str, grows: bool) -> Iterator[Item]:
        for found in self._reader.exchanges(line):
            if not isinstance(found, Refused):
                yield Item(where, found, private=True)
            elif line.whole or not grows:
                yield Item(where, "", str(found), private=True)

    def records(self, item: Item, encoder: Encoder) -> list[Record]:
        """Return the record of an exchange."""
        return [self._reader.record(item.value, encoder)]

    def prompts(self, item: Item, encoder: Encoder) -> list[tuple[str, list[int]]]:
        """Return the name of an exchange and the ids that the target read."""
        found: Found = item.value
        return [(found.exchange.id, self._reader.prompt(found, encoder))]

    def version(self) -> Any:
        """Return a value that changes with the files."""
        return stamps(log_files(self.settings.path))
