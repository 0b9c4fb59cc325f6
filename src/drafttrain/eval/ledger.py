"""The ledger records every forward of every model; all call counts and bytes come from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from drafttrain.core.generations import ForwardEvent


@dataclass
class Ledger:
    """The forwards of one decoding. `ledger.append` is a listener."""

    events: list[ForwardEvent] = field(default_factory=list)

    def append(self, event: ForwardEvent) -> None:
        """Record one forward."""
        self.events.append(event)

    def rounds(self, model: str | None = None) -> list[ForwardEvent]:
        """Return the forwards of the rounds, without prefill."""
        return [event for event in self.events if not event.prefill and model in (None, event.model)]

    def calls(self, model: str) -> int:
        """Return the number of calls of a model in the rounds."""
        return len(self.rounds(model))

    def bytes_read(self) -> int:
        """Return the bytes that all forwards of the rounds read; shared weights count each time they are read."""
        return sum(event.bytes_read for event in self.rounds())

    def plain_bytes(self) -> int:
        """Return the bytes that plain calls would have read, one for each target call."""
        return sum(event.plain_bytes for event in self.rounds("target"))

    def by_round(self) -> list[list[ForwardEvent]]:
        """Return the forwards of each round: a call of the target ends it."""
        found: list[list[ForwardEvent]] = [[]]
        for event in self.rounds():
            found[-1].append(event)
            if event.model == "target":
                found.append([])
        return found[:-1]
