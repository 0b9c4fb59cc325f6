"""Logs of a serving stack, read once: what is there now. `data_gen.serving_logs.intake` goes on reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs.encoding import ExchangeEncoder
from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused
from drafttrain.data_gen.serving_logs.lines import DAMAGED, Line, lines, log_files, opened
from drafttrain.data_gen.serving_logs.reading import Reading
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.serving_logs.untrusted import guard
from drafttrain.data_gen.sources import Item, sources, stamps


@sources.register("serving_logs", ServingLogsSettings)
class ServingLogs:
    """The exchanges of all files, in the order of their rotation."""

    def __init__(self, settings: ServingLogsSettings) -> None:
        self.settings = settings
        self._reading = Reading(settings)
        self._encoder: ExchangeEncoder | None = None

    def items(self) -> Iterator[Item]:
        """Yield every exchange, and every line that holds none with the reason. A last line that is still written is left out."""
        self._reading = Reading(self.settings)
        for path in log_files(self.settings.path):
            try:
                with opened(path) as file:
                    for number, line in enumerate(lines(file, start=0, max_bytes=self._max_bytes), start=1):
                        yield from self._items(line, where=f"{path}:{number}")
            except DAMAGED:
                yield Item(str(path), "", "damaged: the gzip file is cut off, or is none", private=True)

    def _items(self, line: Line, *, where: str) -> Iterator[Item]:
        if line.data is None:
            if line.whole:
                yield Item(where, "", str(Refused("too_long", "longer than max_line_mb allows")), private=True)
            return
        if not line.data.strip():
            return
        for found in self._reading.line(line.data):
            if not isinstance(found, Refused):
                yield Item(where, {"exchange": found[0], "mark": found[1]}, private=True)
            elif line.whole:
                yield Item(where, "", str(found), private=True)

    def records(self, item: Item, encoder: Encoder) -> list[Record]:
        """Return the record of an exchange."""
        with guard():
            record = self._exchanges(encoder).record(item.value["exchange"])
        self._reading.duplicates.remember(item.value["mark"])
        return [record]

    def prompts(self, item: Item, encoder: Encoder) -> list[tuple[str, list[int]]]:
        """Return what the target read in an exchange."""
        exchange: Exchange = item.value["exchange"]
        with guard():
            tokens = self._exchanges(encoder).prompt(exchange)
        self._reading.duplicates.remember(item.value["mark"])
        return [(exchange.id, tokens)]

    def _exchanges(self, encoder: Encoder) -> ExchangeEncoder:
        if self._encoder is None:
            self._encoder = ExchangeEncoder(encoder, self._reading.redact, law=self.settings.law)
        return self._encoder

    def version(self) -> Any:
        """Return what changes with the files."""
        return stamps(log_files(self.settings.path))

    @property
    def _max_bytes(self) -> int:
        return int(self.settings.max_line_mb * 2**20)
