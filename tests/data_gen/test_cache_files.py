"""The files of a cache: common beginnings once, damage found where it is read, and a full disk that leaves whole shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.stored import row_layout
from drafttrain.data_gen.stored.cache_writer import build_cache, rows_of_texts
from drafttrain.data_gen.stored.row_layout import RowLayout, shared_beginnings
from drafttrain.data_gen.stored.shard_files import ShardFiles
from drafttrain.data_gen.stored.target_cache import RowCache, with_stored
from drafttrain.data_gen.stored.target_sums import add_sums
from drafttrain.data_gen.stored.validation_target import _Texts
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.training.layouts import small_files

WANTED = Wanted("states", TargetNeeds(hidden=(1,)), 0, "float32")
SYSTEM = list(range(60, 90))
TEXTS = [
    [*SYSTEM, 1, 2, 3],
    list(range(10, 40)),
    [*SYSTEM, *range(100, 120), 7, 7],  # two answers to one prompt
    [*SYSTEM, *range(100, 120), 8, 9, 10],
    [*SYSTEM, *range(100, 120), 8, 9, 10],  # a copy
    [*SYSTEM, *range(100, 110)],  # the beginning of another
    [*SYSTEM[:5], 4, 4, 4],  # too short a common beginning
]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="t", fingerprint="")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_layout, "TOKENS_A_SHARD", 40)


def built(
    folder: Path, target: Target, texts: Sequence[Sequence[int]] = TEXTS, *, wanted: Wanted = WANTED, max_gb: float = 1
) -> RowCache:
    return build_cache(folder, _Texts(texts), range(len(texts)), target, wanted=wanted, max_gb=max_gb)


def rows(cache: RowCache, record: int) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in cache.stored(record, cache.layout.sizes[record]).items()}


def whole(text: Sequence[int]) -> Record:
    """Return a record of a text, all of which is trained."""
    return Record("a", text, [True] * len(text))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


@pytest.mark.parametrize("wanted", [WANTED, Wanted("top_k", TargetNeeds(final=True), 4, "float32")])
@pytest.mark.usefixtures("small_shards")
def test_reading_gives_the_rows_that_each_record_would_have_by_itself(
    target: Target, tmp_path: Path, wanted: Wanted
) -> None:
    cache = built(tmp_path, target, wanted=wanted)
    assert len(cache.files) > 1
    assert cache.layout.num_rows < sum(map(len, TEXTS))
    for record, text in enumerate(TEXTS):
        alone, _ = rows_of_texts([whole(text)], target, wanted, skipped=[0], read=lambda count: None)
        for name, array in rows(cache, record).items():
            np.testing.assert_allclose(array, alone[name], rtol=1e-4, atol=1e-5)
    batch, places = pack([whole(TEXTS[i]) for i in (3, 1)], width=96, weight_of_step=1.0)
    batch = with_stored(batch, places, [(cache, i, len(TEXTS[i])) for i in (3, 1)])
    name = "hidden_1" if wanted is WANTED else "final"
    assert batch.target is not None
    states_BTD = batch.target.hidden_BTD[1] if wanted is WANTED else batch.target.final_BTD
    assert states_BTD is not None
    row, column = places[0]
    wanted_TD = torch.from_numpy(rows(cache, 3)[name])
    assert torch.equal(states_BTD[row, column : column + len(TEXTS[3])], wanted_TD)


def test_each_beginning_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_layout, "LEAST_SHARED", 1)
    generator = np.random.default_rng(0)
    texts = {number: generator.integers(0, 3, generator.integers(1, 9)).astype(np.uint32) for number in range(200)}
    layout = RowLayout({number: len(text) for number, text in texts.items()}, shared_beginnings(texts))
    beginnings = {tuple(text[:length]) for text in texts.values() for length in range(1, len(text) + 1)}
    assert layout.num_rows == len(beginnings)
    for number, text in texts.items():
        pieces = layout.pieces(number)
        assert [one.first for one in pieces] == [0, *(one.end for one in pieces)][:-1]
        assert pieces[-1].end == len(text)
        assert all(np.array_equal(texts[one.owner][: one.end], text[: one.end]) for one in pieces)


def test_control_a_wrong_common_length_gives_other_rows(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_too_many(texts: Any) -> dict[int, tuple[int, int]]:
        found = {}
        for record, (other, count) in shared_beginnings(texts).items():
            found[record] = other, min(count + 1, len(texts[other]), len(texts[record]))
        return found

    monkeypatch.setattr("drafttrain.data_gen.stored.cache_writer.shared_beginnings", one_too_many)
    cache = built(tmp_path, target)
    alone, _ = rows_of_texts([whole(TEXTS[3])], target, WANTED, skipped=[0], read=lambda count: None)
    assert np.abs(rows(cache, 3)["hidden_1"] - alone["hidden_1"]).max() > 0.1


def test_what_sharing_saves_is_announced_and_the_limit_counts_what_is_stored(
    target: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = built(tmp_path, target)
    tokens, stored = sum(map(len, TEXTS)), cache.layout.num_rows
    assert f"{tokens} tokens, {tokens - stored} of them in beginnings that are stored once" in capfd.readouterr().err
    size = sum(np.load(path).nbytes for path in tmp_path.glob("*.npy"))
    assert size == stored * WANTED.bytes_a_row(target)
    with pytest.raises(DataError, match=r"data\.max_cache_gb allows.*bfloat16 or int8"):
        built(tmp_path / "other", target, max_gb=(size - 1) / 1e9)
    built(tmp_path / "other", target, max_gb=size / 1e9)
    built(tmp_path / "none", target, TEXTS[:2])
    assert "stored once" not in capfd.readouterr().err.splitlines()[-1]


def test_sums_are_there_for_a_label_of_any_record_that_shares_the_row(target: Target, tmp_path: Path) -> None:
    class Masked(_Texts):
        def __getitem__(self, index: int) -> Record:
            text = self._texts[index]
            first = 40 if index == 2 else 20  # of the texts that share the longest beginning, one is trained later
            return Record(str(index), text, [position >= first for position in range(len(text))])

    texts = Masked(TEXTS)
    cache = build_cache(tmp_path, texts, range(len(TEXTS)), target, wanted=WANTED, max_gb=1)
    add_sums(cache, texts, target)
    summed = RowCache(tmp_path, target, WANTED)
    for record, text in enumerate(TEXTS):
        labels_T = np.append(np.array(texts[record].loss_mask)[1:], False)
        sums_T = summed.stored(record, len(text), ["log_total"])["log_total"].numpy()
        assert np.isfinite(sums_T[labels_T]).all()
    # A row that no record trains has none.
    assert np.isnan(summed.stored(1, 10, ["log_total"])["log_total"].numpy()).all()


def flip(path: Path, *, row: int) -> None:
    """Flip one bit of a row of an array."""
    array = np.load(path, mmap_mode="r+")
    array[row].reshape(-1).view(np.uint8)[1] ^= 1
    array.flush()


@pytest.mark.usefixtures("small_shards")
def test_a_flipped_bit_is_found_where_it_is_read_and_only_its_shard_is_written_again(
    target: Target, tmp_path: Path
) -> None:
    cache = built(tmp_path, target)
    before, whole = times(tmp_path), rows(cache, 1)
    shard, begin = cache.layout.place(1)
    flip(cache.files[shard].path("hidden_1"), row=begin + 2)
    cache = built(tmp_path, target)
    rows(cache, 0)
    with pytest.raises(
        DataError, match=rf"hidden_1-{shard:05d}\.npy: .* rows .*checksum.*writes only this shard again"
    ):
        rows(cache, 1)
    assert (tmp_path / f"hidden_1-{shard:05d}.npy.damaged").exists()
    again = built(tmp_path, target)
    assert all(np.array_equal(array, whole[name]) for name, array in rows(again, 1).items())
    changed = {name for name, time in times(tmp_path).items() if before[name] != time}
    assert changed == {f"hidden_1-{shard:05d}.npy", f"final-{shard:05d}.npy"}
    assert not list(tmp_path.glob("*.damaged"))


def test_control_without_checksums_a_flipped_bit_is_not_noticed(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = built(tmp_path, target)
    whole = rows(cache, 1)
    shard, begin = cache.layout.place(1)
    flip(cache.files[shard].path("hidden_1"), row=begin + 2)
    monkeypatch.setattr(ShardFiles, "check", lambda *_: None)
    assert not np.array_equal(rows(built(tmp_path, target), 1)["hidden_1"], whole["hidden_1"])


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_is_cut_short_is_written_again(target: Target, tmp_path: Path) -> None:
    built(tmp_path, target)
    path = tmp_path / "final-00001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    built(tmp_path, target)
    assert path.read_bytes() == whole


def test_shards_of_an_earlier_version_get_checksums(target: Target, tmp_path: Path) -> None:
    texts = [TEXTS[1], TEXTS[0]]
    cache = built(tmp_path, target, texts)
    before = times(tmp_path)
    for path in tmp_path.glob("shard-*.json"):
        path.unlink()
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({key: value for key, value in plan.items() if key != "shared"}))
    built(tmp_path, target, texts)
    assert times(tmp_path) == before
    flip(cache.files[0].path("final"), row=3)
    with pytest.raises(DataError, match="checksum"):
        rows(built(tmp_path, target, texts), 0)


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_leaves_the_shards_so_far_and_the_same_command_writes_the_rest(
    target: Target, tmp_path: Path
) -> None:
    texts = [list(range(10)), list(range(50, 90)), list(range(10, 20))]
    no_room = r"no room for shard 1 .*\(File too large\)\. The shards before it are whole"
    with small_files(30 * 32 * 4), pytest.raises(DataError, match=no_room):
        built(tmp_path, target, texts)
    before = times(tmp_path)
    assert set(before) == {"hidden_1-00000.npy", "final-00000.npy"}
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))
    cache = built(tmp_path, target, texts)
    assert before.items() <= times(tmp_path).items()
    whole = built(tmp_path / "whole", target, texts)
    for record in range(3):
        ours, theirs = rows(cache, record), rows(whole, record)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
