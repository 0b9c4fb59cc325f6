"""Training on a cache that is still being written: the same batches, and no shard is read before it is complete."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from drafttrain.data_gen.stored import row_layout
from drafttrain.data_gen.stored.arriving import Arriving
from drafttrain.data_gen.stored.shard_files import ShardFiles
from drafttrain.data_gen.training_data import TrainingData, attach_cache, prepare
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama

STEPS, BATCH = 6, 4
LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="t", fingerprint="")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSettings:
    monkeypatch.setattr(row_layout, "TOKENS_A_SHARD", 60)
    # The last records share a beginning that only one of them holds.
    texts = [f"text {i} " + "ab" * (i % 7) for i in range(24)] + [
        f"a long common beginning of all, {i}" for i in range(6)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSettings([JSONLSettings(path=str(path))], max_length=48, cache="states", overlap_ngram=0)


def data_in(folder: Path, settings: DataSettings) -> TrainingData:
    return prepare(settings, folder, tokenizer=byte_tokenizer(), tokenizer_fingerprint="", seed=0)


def cached(data: TrainingData, folder: Path, target: Target, *, sums: bool, arriving: Arriving | None = None) -> None:
    needs = TargetNeeds(hidden=(1,))
    attach_cache(data, folder, target, num_records=STEPS * BATCH, own_vocabulary=sums, needs=needs, arriving=arriving)


def tensors(data: TrainingData, step: int) -> list[torch.Tensor]:
    """Return all tensors of a step's batches."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    for batch in data.of_step(step, batch_size=BATCH, records_per_device=2):
        batch.each(note)
        assert batch.target is not None
    return found


def last_shard(data: TrainingData, place: int) -> int:
    """Return the last shard that the record at a place of the order needs."""
    cache, (_, record) = data.caches[0], data.sampler.at(place)
    assert cache is not None
    return max(cache.layout.place(piece.owner)[0] for piece in cache.layout.pieces(record))


class Slow(Target):
    """A target that reads on only when a test lets it."""

    def __init__(self, target: Target, turns: threading.Semaphore) -> None:
        super().__init__(target.model, target.tokenizer, name=target.name, fingerprint=target.fingerprint)
        self.turns = turns

    def read(self, *given: Any, **options: Any) -> Any:
        assert self.turns.acquire(timeout=LIMIT_SECONDS)
        return super().read(*given, **options)


@pytest.mark.parametrize("sums", [False, True])
def test_batches_are_those_of_the_finished_cache_and_the_first_ones_come_before_its_end(
    target: Target, settings: DataSettings, tmp_path: Path, sums: bool
) -> None:
    whole = data_in(tmp_path / "whole", settings)
    cached(whole, tmp_path / "whole", target, sums=sums)
    wanted = [tensors(whole, step) for step in range(STEPS)]

    folder, turns = tmp_path / "meanwhile", threading.Semaphore(0)
    data, slow = data_in(folder, settings), Slow(target, turns)
    limit = time.monotonic() + LIMIT_SECONDS
    arriving = Arriving(lambda: "the test has waited too long" if time.monotonic() > limit else None)
    cached(data, folder, target, sums=sums, arriving=arriving)
    assert arriving.missing == len(data.caches[0].files) > 4
    writer = threading.Thread(target=lambda: cached(data_in(folder, settings), folder, slow, sums=sums), daemon=True)
    writer.start()
    found, written = [], 0
    for step in range(STEPS):
        # The writer goes on by the shards that this step needs, and no further.
        needed = 1 + max(last_shard(data, place) for place in range((step + 1) * BATCH))
        if needed > written:
            turns.release(needed - written)
            written = needed
        found.append(tensors(data, step))
        if step == 0:
            assert written < arriving.missing
            assert not (folder / "0-cache" / "cache.json").exists()
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert len(ours) == len(theirs) > 0, step
        for one, other in zip(ours, theirs, strict=True):
            # Sums are stored for labels only.
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    turns.release(100)
    writer.join(LIMIT_SECONDS)
    assert (folder / "0-cache" / "cache.json").exists()


def test_a_shard_without_its_note_is_not_read(target: Target, settings: DataSettings, tmp_path: Path) -> None:
    writer = data_in(tmp_path, settings)
    cached(writer, tmp_path, target, sums=False)
    note = tmp_path / "0-cache" / "shard-00000.json"
    text = note.read_text()
    ended: list[str] = []
    data = data_in(tmp_path, settings)
    cached(data, tmp_path, target, sums=False, arriving=Arriving(lambda: ended[0] if ended else None))
    note.unlink()
    ended.append("the process that writes them failed: no room")
    with pytest.raises(
        DataError, match=r"needs shard 0 of the cached target outputs, and the process .* failed: no room"
    ):
        tensors(data, 0)
    # The control: with its note it is read, whatever became of the writer.
    note.write_text(text)
    assert tensors(data, 0)


def test_an_incomplete_shard_is_removed_before_training_waits_for_it(
    target: Target, settings: DataSettings, tmp_path: Path
) -> None:
    cached(data_in(tmp_path, settings), tmp_path, target, sums=False)
    half = tmp_path / "0-cache" / "final-00001.npy"
    half.write_bytes(half.read_bytes()[:-40])
    data, arriving = data_in(tmp_path, settings), Arriving(lambda: "its writer has ended")
    cached(data, tmp_path, target, sums=False, arriving=arriving)
    assert arriving.missing == 1
    assert not half.exists()
    assert not ShardFiles(half.parent, 1, ()).note.exists()


def test_records_are_stored_in_the_order_in_which_training_needs_them(
    target: Target, settings: DataSettings, tmp_path: Path
) -> None:
    data = data_in(tmp_path, settings)
    cached(data, tmp_path, target, sums=False)
    needed, last = [last_shard(data, place) for place in range(STEPS * BATCH)], -1
    for one in needed:
        # A record needs at most the next shard after those of the records before it.
        assert one <= last + 1
        last = max(last, one)
    assert data.caches[0] is not None
    assert last == len(data.caches[0].files) - 1
