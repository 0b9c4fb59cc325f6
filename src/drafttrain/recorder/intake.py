"""Takes up what is new in a folder of logs, batch by batch, so that a kill at any moment loses nothing and doubles nothing.

    batch-00000012.jsonl   the records of a batch; quarantine-00000012.jsonl what was set aside, if anything
    cursor.json            how many batches there are, and where in the logs the last one ends

A batch counts from the moment cursor.json is renamed: it names the batch and the places behind it together. A batch that a kill left
without is written again from the same lines.
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
    """A record that was taken up."""

    record: Record
    user: str
    """The pseudonym of who asked; empty: the log does not say."""
    mark: Mark


class Intake:
    """What was taken up of one folder of logs.

    An answer whose request vLLM logged before a restart is set aside as `no_request`: waiting requests are in memory only.

    Args:
        about: What the records depend on besides the settings, such as the fingerprint of the tokenizer.

    Raises:
        DataError: The folder was begun with other settings.
    """

    def __init__(self, settings: ServingLogsSettings, encoder: Encoder, folder: Path, *, about: Any = None) -> None:
        self.settings = settings
        self.folder = folder
        self._encoder = encoder
        content = {key: value for key, value in content_of(settings).items() if key != "weight"}
        self._about = json.loads(json.dumps({"source": content, "records": about, "max_length": encoder.max_length}))
        self._resume()

    def _resume(self) -> None:
        """Stand where cursor.json says."""
        cursor = self.folder / "cursor.json"
        state: dict[str, Any] = {"about": self._about, "batches": 0, "model": "", "places": []}
        if cursor.exists():
            state = json.loads(cursor.read_text(encoding="utf-8"))
            if state["about"] != self._about:
                raise DataError(f"{self.folder}: was begun with other settings; give the intake another folder")
        self.num_batches: int = state["batches"]
        self.counts = Counter[str](state.get("lines", {}))
        """Lines by what became of them: used, announces (the request of an answer), or the kind of reason."""
        self.choices_set_aside = Counter[str](state.get("choices_set_aside", {}))
        """Answers that were set aside of lines of which another one is used."""
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
        """Lines that were read; empty ones are none."""
        return self.counts.total()

    def take(self, *, max_lines: int = 1000) -> int | None:
        """Take up the next lines and return how many records they gave; None: there was nothing new."""
        try:
            return self._take(max_lines)
        except BaseException:
            # What was remembered of lines that are not committed must not hide them from the next attempt.
            self._resume()
            raise

    def _take(self, max_lines: int) -> int | None:
        found, places = follow(
            self.settings.path,
            self._places,
            max_line_bytes=int(self.settings.max_line_mb * 2**20),
            max_lines=max_lines,
        )
        if places == self._places:
            return None
        taken: list[Served] = []
        refused: list[dict[str, str]] = []
        for where, line in found:
            if line.data is None or line.data.strip():
                records, reasons = self._line(line)
                taken += records
                refused += [{"where": where, "reason": str(reason)} for reason in reasons]
                kinds = [reason.kind for reason in reasons]
                self.counts["used" if records else kinds[0] if kinds else "announces"] += 1
                self.choices_set_aside.update(kinds if records else kinds[1:])
        number = f"{self.num_batches:08d}.jsonl"
        for name, entries in (("batch", [served_as_json(served) for served in taken]), ("quarantine", refused)):
            if entries or name == "batch":
                write_text(self.folder / f"{name}-{number}", "".join(json.dumps(entry) + "\n" for entry in entries))
        self._sizes[self.num_batches] = len(taken)
        self._commit(places)
        return len(taken)

    def _line(self, line: Line) -> tuple[list[Served], list[Refused]]:
        taken, reasons = [], []
        for found in self._reader.exchanges(line):
            if isinstance(found, Refused):
                reasons.append(found)
                continue
            try:
                record = self._reader.record(found, self._encoder)
            except Refused as reason:
                reasons.append(reason)
            else:
                taken.append(Served(record, found.exchange.user, found.mark))
        return taken, reasons

    def _commit(self, places: list[Place]) -> None:
        self._places = places
        self.num_batches += 1
        state = {
            "about": self._about,
            "batches": self.num_batches,
            "model": self._reader.model,
            "lines": dict(self.counts),
            "choices_set_aside": dict(self.choices_set_aside),
            "places": [asdict(place) for place in places],
        }
        write_json(self.folder / "cursor.json", state)

    def forget(self, *, stop_batch: int) -> None:
        """Remove batches before this one, as far as new exchanges are no longer compared with theirs."""
        newer = sum(self._sizes.values())
        while self._first < stop_batch and newer - self._sizes[self._first] >= self.settings.remembered:
            newer -= self._sizes.pop(self._first)
            for name in ("quarantine", "batch"):
                (self.folder / f"{name}-{self._first:08d}.jsonl").unlink(missing_ok=True)
            self._first += 1

    def served(self, *, first_batch: int = 0, stop_batch: int | None = None) -> Iterator[Served]:
        """Yield what was taken up, in its order, but for what was forgotten."""
        for number in range(max(first_batch, self._first), self.num_batches if stop_batch is None else stop_batch):
            with (self.folder / f"batch-{number:08d}.jsonl").open(encoding="utf-8") as file:
                for line in file:
                    yield served_from_json(json.loads(line))


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def served_as_json(served: Served) -> dict[str, Any]:
    """Return what was taken up as JSON can hold it, without the user's name."""
    record, law = served.record, served.record.law
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
    if law is not None:
        known_NK = law.ids_NK >= 0
        value["law_ids"] = [ids[known].tolist() for ids, known in zip(law.ids_NK, known_NK, strict=True)]
        value["law_log_probs"] = [row[known].tolist() for row, known in zip(law.log_probs_NK, known_NK, strict=True)]
    return value


def served_from_json(value: dict[str, Any]) -> Served:
    """Return what `served_as_json` wrote."""
    prompt, count = value["prompt_tokens"], len(value["tokens"])
    law = None
    if "law_ids" in value:
        width = max(map(len, value["law_ids"]))
        ids_NK = np.full((len(value["law_ids"]), width), -1, dtype=np.int32)
        log_probs_NK = np.full(ids_NK.shape, -np.inf, dtype=np.float32)
        for row, (ids, log_probs) in enumerate(zip(value["law_ids"], value["law_log_probs"], strict=True)):
            ids_NK[row, : len(ids)], log_probs_NK[row, : len(ids)] = ids, log_probs
        law = LoggedDistribution(ids_NK, log_probs_NK)
    mask = [False] * prompt + [True] * (count - prompt)
    record = Record(
        value["id"],
        value["tokens"],
        mask,
        domain=value["domain"],
        refused=value.get("refused"),
        num_rounds=value.get("rounds"),
        law=law,
    )
    return Served(record, value["user"], Mark(*value["mark"]))
