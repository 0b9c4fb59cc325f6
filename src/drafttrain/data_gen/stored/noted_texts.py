"""Notes beside the tokens of a store's texts on disk: written shard by shard, read by record.

T = tokens of a text, C = columns
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.altered_text import Alteration
from drafttrain.core.console import progress, say
from drafttrain.core.files import write_json
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Record
from drafttrain.data_gen.groups import groups
from drafttrain.data_gen.stored.records import Store
from drafttrain.data_gen.stored.shard_files import ShardFiles
from drafttrain.drafters.text_notes import Notes, TextNotes
from drafttrain.target_model import Target

RECORDS_A_SHARD = 64
ARRAY = "notes"


class NotedTexts:
    """The notes of a store's texts.

    Args:
        about: What they depend on; notes of something else are removed.
    """

    def __init__(self, folder: Path, store: Store, notes: TextNotes, *, about: dict[str, Any], seed: int) -> None:
        self.folder = folder
        self.store = store
        self.notes = notes
        self.seed = seed
        numbers = range(len(store))
        self._shards = [numbers[start : start + RECORDS_A_SHARD] for start in range(0, len(store), RECORDS_A_SHARD)]
        self._open: dict[int, Any] = {}
        self._checked: set[int] = set()
        plan, wanted = folder / "notes.json", json.loads(json.dumps(about))
        if not plan.exists() or json.loads(plan.read_text(encoding="utf-8")) != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(plan, wanted)

    def write(self, records: Sequence[int], target: Target) -> None:
        """Note the texts of these records, with the others of their shards; shards that are there are skipped."""
        wanted = sorted({record // RECORDS_A_SHARD for record in records})
        missing = [number for number in wanted if not self._there(number)]
        with progress(f"noting {self.notes.name}", total=len(missing), unit="shards") as bar:
            for number in missing:
                texts = [self.store[index] for index in self._shards[number]]
                found: dict[int, Notes] = {}
                for group in groups([len(text.tokens) for text in texts]):
                    made = self.notes.of([texts[i] for i in group], target, seed=self.seed)
                    found |= dict(zip(group, made, strict=True))
                self._files(number).write({ARRAY: np.concatenate([found[i] for i in range(len(texts))])}, {})
                bar.advance(1)
        members = [index for number in wanted for index in self._shards[number]]
        say(self.notes.summary([self.store[i] for i in members], [self[i] for i in members]))

    def __getitem__(self, index: int) -> Notes:
        number, place = divmod(index, RECORDS_A_SHARD)
        files = self._files(number)
        if number not in self._open:
            self._open[number] = files.open(ARRAY)
        if index not in self._checked:
            files.check(ARRAY, self._open[number], place, files.checks()[ARRAY][place])
            self._checked.add(index)
        begin = sum(files.lengths[:place])
        found: Notes = np.asarray(self._open[number][begin : begin + files.lengths[place]])
        return found

    def altered(self, index: int, record: Record, *, step: int, number: int) -> Alteration:
        """Return how the text is read a second time, as record `number` of a step."""
        return self.notes.altered(
            record, self[index], seed=stream_seed(self.seed, self.notes.name, record.id, step, number)
        )

    def _files(self, number: int) -> ShardFiles:
        return ShardFiles(self.folder, number, tuple(self.store.length(i) for i in self._shards[number]))

    def _there(self, number: int) -> bool:
        files = self._files(number)
        return files.has({ARRAY: ((sum(files.lengths), self.notes.columns), np.int32)})
