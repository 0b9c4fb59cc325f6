"""Reads new lines of a folder of logs, batch by batch. A kill at any moment neither loses nor duplicates a record.

    batch-00000012.jsonl        the records of a batch
    quarantine-00000012.jsonl   its quarantined lines, if there are any
    cursor.json                 the number of batches, and the positions in the logs after the last one

A batch is committed when cursor.json is renamed, which sets the number of batches and the positions together. A batch that a kill left
uncommitted is written again from the same lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json, write_text
from drafttrain.core.texts import LoggedDistribution, Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs.duplicates import Mark
from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.data_gen.serving_logs.lines import Line
from drafttrain.data_gen.serving_logs.pseudonyms import Pseudonyms
from drafttrain.data_gen.serving_logs.reading import LogReader
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.sources import content_of
from drafttrain.recorder.growing_logs import Place, follow


@dataclass(frozen=True)
class Served:
    """A record of a served request."""

    record: Record
    user: str
    """Pseudonym of the user; empty: the log names no user."""
    mark: Mark


class Intake:
    """The records that were read from one folder of logs.

    vLLM logs a request and its answer on separate lines. An answer whose request was logged before a restart of this process is
    quarantined as `no_request`, because waiting requests are in memory only.

    Args:
        about: Other inputs that the records depend on, such as the fingerprint of the tokenizer.

    Raises:
        DataError: The folder was written with other settings.
    """

    def __init__(self, settings: ServingLogsSettings, encoder: Encoder, folder: Path, *, about: Any = None) -> None:
        self.settings = settings
        self.folder = folder
        self._encoder = encoder
        content = {key: value for key, value in content_of(settings).items() if key != "weight"}
        self._about = json.loads(json.dumps({"source": content, "records": about, "max_length": encoder.max_length}))
        self._resume()

    def _resume(self) -> None:
        """Restore the state of cursor.json."""
        cursor = self.folder / "cursor.json"
        state: dict[str, Any] = {"about": self._about, "batches": 0, "model": "", "places": []}
        if cursor.exists():
            state = json.loads(cursor.read_text(encoding="utf-8"))
            if state["about"] != self._about:
                raise DataError(f"{self.folder}: written with other settings; choose another folder for the intake")
        self.num_batches: int = state["batches"]
        self.counts = Counter[str](state.get("lines", {}))
        """Lines by outcome: used, announces (a request whose answer follows), or the kind of quarantine."""
        self.quarantined_choices = Counter[str](state.get("choices_set_aside", {}))
        """Quarantined answers of lines with another answer that is used."""
        self._places = [Place(**place | {"states": tuple(place["states"])}) for place in state["places"]]
        self._reader = LogReader(self.settings, model=state["model"], pseudonyms=Pseudonyms(self.folder))
        kept = [number for path in self.folder.glob("batch-*.jsonl") if (number := _number(path)) < self.num_batches]
        self._first = min(kept, default=self.num_batches)
        self._sizes: dict[int, int] = {}
        for number in range(self._first, self.num_batches):
            self._sizes[number] = 0
            for served in self.served(first_batch=number, stop_batch=number + 1):
                self._sizes[number] += 1
                self._reader.duplicates.remember(served.mark)

    @property
    def num_lines(self) -> int:
        """Number of lines read, without empty ones."""
        return self.counts.total()

    def take(self, *, max_lines: int = 1000) -> int | None:
        """Read the next lines and return the number of records; None: there was no new line."""
        try:
            return self._read_batch(max_lines)
        except BaseException:
            # Uncommitted lines must not count as duplicates in the next attempt.
            self._resume()
            raise

    def _read_batch(self, max_lines: int) -> int | None:
        next_lines, places = follow(
            self.settings.path,
            self._places,
            max_line_bytes=int(self.settings.max_line_mb * 2**20),
            max_lines=max_lines,
        )
        if places == self._places:
            return None
        found_records: list[Served] = []
        refused: list[dict[str, str]] = []
        for where, line in next_lines:
            if line.data is None or line.data.strip():
                records, reasons = self._line(line)
                found_records += records
                refused += [{"where": where, "reason": str(reason)} for reason in reasons]
                kinds = [reason.kind for reason in reasons]
                self.counts["used" if records else kinds[0] if kinds else "announces"] += 1
                self.quarantined_choices.update(kinds if records else kinds[1:])
        number = f"{self.num_batches:08d}.jsonl"
        for name, entries in (("batch", [served_as_json(served) for served in found_records]), ("quarantine", refused)):
            if entries or name == "batch":
                write_text(self.folder / f"{name}-{number}", "".join(json.dumps(entry) + "\n" for entry in entries))
        self._sizes[self.num_batches] = len(found_records)
        self._commit(places)
        return len(found_records)

    def _line(self, line: Line) -> tuple[list[Served], list[Refused]]:
        found_records, reasons = [], []
        for found in self._reader.exchanges(line):
            if isinstance(found, Refused):
                reasons.append(found)
                continue
            try:
                record = self._reader.record(found, self._encoder)
            except Refused as reason:
                reasons.append(reason)
            else:
                found_records.append(Served(record, found.exchange.user, found.mark))
        return found_records, reasons

    def _commit(self, places: list[Place]) -> None:
        self._places = places
        self.num_batches += 1
        state = {
            "about": self._about,
            "batches": self.num_batches,
            "model": self._reader.model,
            "lines": dict(self.counts),
            "choices_set_aside": dict(self.quarantined_choices),
            "places": [asdict(place) for place in places],
        }
        write_json(self.folder / "cursor.json", state)

    def forget(self, *, stop_batch: int) -> None:
        """Remove older batches, except those that new records are still compared with."""
        newer = sum(self._sizes.values())
        while self._first < stop_batch and newer - self._sizes[self._first] >= self.settings.remembered:
            newer -= self._sizes.pop(self._first)
            for name in ("quarantine", "batch"):
                (self.folder / f"{name}-{self._first:08d}.jsonl").unlink(missing_ok=True)
            self._first += 1

    def served(self, *, first_batch: int = 0, stop_batch: int | None = None) -> Iterator[Served]:
        """Yield the records in order, without removed batches."""
        for number in range(max(first_batch, self._first), self.num_batches if stop_batch is None else stop_batch):
            with (self.folder / f"batch-{number:08d}.jsonl").open(encoding="utf-8") as file:
                for line in file:
                    yield served_from_json(json.loads(line))


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def served_as_json(served: Served) -> dict[str, Any]:
    """Return a record in JSON types. The user is a pseudonym already."""
    record, logged = served.record, served.record.logged
    value: dict[str, Any] = {
        "id": record.id,
        "domain": record.domain,
        "user": served.user,
        "tokens": list(record.tokens),
        "prompt_tokens": len(record.loss_mask) - sum(record.loss_mask),
        "mark": [served.mark.exact, served.mark.near],
    }
    if record.refused is not None:
        value["refused"] = list(record.refused)
    if record.num_rounds is not None:
        value["rounds"] = record.num_rounds
    if logged is not None:
        known_NK = logged.ids_NK >= 0
        value["law_ids"] = [ids[known].tolist() for ids, known in zip(logged.ids_NK, known_NK, strict=True)]
        value["law_log_probs"] = [row[known].tolist() for row, known in zip(logged.log_probs_NK, known_NK, strict=True)]
    return value


def served_from_json(value: dict[str, Any]) -> Served:
    """Return a record that `served_as_json` wrote."""
    prompt, count = value["prompt_tokens"], len(value["tokens"])
    logged = None
    if "law_ids" in value:
        width = max(map(len, value["law_ids"]))
        ids_NK = np.full((len(value["law_ids"]), width), -1, dtype=np.int32)
        log_probs_NK = np.full(ids_NK.shape, -np.inf, dtype=np.float32)
        for row, (ids, log_probs) in enumerate(zip(value["law_ids"], value["law_log_probs"], strict=True)):
            ids_NK[row, : len(ids)], log_probs_NK[row, : len(ids)] = ids, log_probs
        logged = LoggedDistribution(ids_NK, log_probs_NK)
    mask = [False] * prompt + [True] * (count - prompt)
    record = Record(
        value["id"],
        value["tokens"],
        mask,
        domain=value["domain"],
        refused=value.get("refused"),
        num_rounds=value.get("rounds"),
        logged=logged,
    )
    return Served(record, value["user"], Mark(*value["mark"]))
