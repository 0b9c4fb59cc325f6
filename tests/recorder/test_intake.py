"""A folder that is read while it is written: every line is read once, despite rotation and kills of the reader."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.recorder.intake import Intake
from tests.data_gen.serving_logs.log_lines import chat_encoder, completion, ids

ENCODER = chat_encoder(max_length=64)


def intake(tmp_path: Path, **settings: Any) -> Intake:
    chosen = ServingLogsSettings(**{"path": str(tmp_path / "logs"), "near_duplicates": None} | settings)
    return Intake(chosen, ENCODER, tmp_path / "taken")


def append(path: Path, *names: str, end: str = "\n") -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for name in names:
            file.write(json.dumps({"id": name} | completion(f"prompt of {name}", "answer")) + end)


def taken(reader: Intake) -> list[str]:
    return [served.record.id for served in reader.served()]


def take_all(reader: Intake, **how: Any) -> list[str]:
    while reader.take(**how) is not None:
        pass
    return taken(reader)


def test_lines_are_read_once_and_an_incomplete_line_waits(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, "1", "2")
    append(log, "3", end="")
    reader = intake(tmp_path)
    assert take_all(reader) == ["1", "2"]
    assert reader.take() is None
    with log.open("a") as file:
        file.write("\n")
    append(log, "4")
    assert take_all(intake(tmp_path)) == ["1", "2", "3", "4"]
    append(tmp_path / "logs" / "b.jsonl", "5")
    assert take_all(intake(tmp_path), max_lines=1) == ["1", "2", "3", "4", "5"]


def rename(log: Path) -> None:
    log.rename(log.with_name("a.jsonl.1"))


def copy_and_truncate(log: Path) -> None:
    shutil.copy(log, log.with_name("a.jsonl.1"))
    os.truncate(log, 0)


def compress(log: Path) -> None:
    log.with_name("a.jsonl.1.gz").write_bytes(gzip.compress(log.read_bytes()))
    log.unlink()


@pytest.mark.parametrize("rotate", [rename, copy_and_truncate, compress])
@pytest.mark.parametrize("read_before", [True, False])
def test_a_rotated_file_is_read_to_its_end_and_not_twice(tmp_path, rotate, read_before):
    log = tmp_path / "logs" / "a.jsonl"
    reader = intake(tmp_path)
    append(log, "1", "2")
    if read_before:
        take_all(reader)
    append(log, "3")
    rotate(log)
    append(log, "4")
    assert sorted(take_all(reader)) == ["1", "2", "3", "4"]
    assert reader.counts == {"used": 4}  # No line was read twice.
    assert intake(tmp_path).take() is None


def test_a_copy_of_a_log_and_an_incomplete_gzip_file_are_not_read(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, "1", "2")
    reader = intake(tmp_path)
    take_all(reader)
    shutil.copy(log, log.with_name("a.jsonl.1"))
    compressed = gzip.compress(log.read_bytes())
    (tmp_path / "logs" / "a.jsonl.1.gz").write_bytes(compressed[:-8])
    take_all(reader)
    append(log, "3")
    assert take_all(reader) == ["1", "2", "3"]
    (tmp_path / "logs" / "a.jsonl.1.gz").write_bytes(compressed)
    take_all(reader)
    assert reader.counts["used"] == 3


def test_a_log_missing_during_rotation_is_waited_for_and_one_that_never_existed_is_an_error(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    with pytest.raises(DataError, match="no such file"):
        intake(tmp_path, path=str(log)).take()
    append(log, "1")
    reader = intake(tmp_path, path=str(log))
    take_all(reader)
    log.rename(tmp_path / "elsewhere")
    assert reader.take() is None
    append(log, "2")
    assert take_all(reader) == ["1", "2"]


def test_an_incomplete_copy_is_not_read(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    names = [str(number) for number in range(100)]
    append(log, *names)
    reader = intake(tmp_path)
    take_all(reader)
    written = log.read_bytes()
    log.with_name("a.jsonl.1").write_bytes(written[: len(written) // 2])
    assert reader.take() is None
    log.with_name("a.jsonl.1").write_bytes(written)
    os.truncate(log, 0)
    append(log, "100")
    assert take_all(reader) == [*names, "100"]
    assert reader.counts == {"used": 101}


def same_start(path: Path, *names: str) -> None:
    """Append lines with the same beginning, such as requests with the same long system prompt."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for name in names:
            file.write(
                json.dumps({"system": "x" * 5000, "id": name} | completion(f"prompt of {name}", "answer")) + "\n"
            )


def test_a_new_log_with_the_same_beginning_as_an_older_one_is_read_at_once(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    same_start(log, "1", "2", "3")
    reader = intake(tmp_path)
    take_all(reader)
    log.rename(log.with_name("a.jsonl.1"))
    same_start(log, "4")
    assert take_all(reader) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("longer", ["a", "b"])
def test_two_logs_with_the_same_first_line_are_both_read(tmp_path, longer):
    logs = tmp_path / "logs"
    append(logs / "a.jsonl", "warm-up")
    reader = intake(tmp_path)
    take_all(reader)
    append(logs / "b.jsonl", "warm-up")
    for name in "ab":
        append(logs / f"{name}.jsonl", f"1 of {name}", *([f"2 of {name}"] if name == longer else []))
    assert sorted(take_all(reader)) == sorted(["1 of a", "1 of b", f"2 of {longer}", "warm-up"])
    append(logs / "a.jsonl", "last of a")
    append(logs / "b.jsonl", "last of b")
    assert {"last of a", "last of b"} <= set(take_all(reader))


@pytest.mark.parametrize("compressed", [False, True])
def test_of_an_unread_log_and_its_copy_only_one_is_read(tmp_path, compressed):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, *"123")
    if compressed:
        log.with_name("a.jsonl.1.gz").write_bytes(gzip.compress(log.read_bytes()))
    else:
        shutil.copy(log, log.with_name("a.jsonl.1"))
    reader = intake(tmp_path)
    assert take_all(reader) == list("123")
    os.truncate(log, 0)
    append(log, *"45")
    assert take_all(reader) == list("12345")
    assert reader.counts == {"used": 5}


def test_a_copy_is_read_if_its_original_was_truncated_before_it_was_read_completely(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, "1")
    reader = intake(tmp_path)
    take_all(reader)
    append(log, *"2345")
    shutil.copy(log, log.with_name("a.copy"))
    reader.take(max_lines=2)
    os.truncate(log, 0)
    assert take_all(reader) == list("12345")


def test_only_max_places_logs_are_remembered_after_their_files_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("drafttrain.recorder.growing_logs.MAX_PLACES", 5)
    log = tmp_path / "logs" / "a.jsonl"
    reader = intake(tmp_path)
    for number in range(12):
        append(log, str(number))
        take_all(reader)
        shutil.copy(log, log.with_name("a.jsonl.1"))
        os.truncate(log, 0)
        take_all(reader)
    places = json.loads((tmp_path / "taken" / "cursor.json").read_text())["places"]
    assert len(places) <= 5 + 2
    assert reader.counts == {"used": 12}


def test_a_truncated_file_with_new_lines_is_a_new_log(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, "1", "2")
    reader = intake(tmp_path)
    take_all(reader)
    os.truncate(log, 0)
    append(log, "3", "4", "5")
    assert take_all(reader) == ["1", "2", "3", "4", "5"]


def test_every_line_is_counted_and_duplicates_are_recognized_after_a_restart(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, "1", "1")
    with log.open("a") as file:
        file.write('\n{"x": 1}\nnonsense\n')
        file.write("[1] Received request r: prompt: 'a', params: x, prompt_token_ids: None\n")
    reader = intake(tmp_path)
    take_all(reader)
    append(log, "1", "2")
    reader = intake(tmp_path)
    take_all(reader)
    assert reader.counts == {"used": 2, "duplicate": 2, "not_a_record": 2, "announces": 1}
    entries = [json.loads(line) for path in (tmp_path / "taken").glob("quarantine-*") for line in path.open()]
    assert len(entries) == 4


def test_old_batches_are_removed_and_a_restart_still_finds_duplicates_of_the_others(tmp_path):
    log = tmp_path / "logs" / "a.jsonl"
    append(log, *"12345678")
    reader = intake(tmp_path, remembered=3)
    assert take_all(reader, max_lines=2) == list("12345678")
    reader.forget(stop_batch=1)
    assert taken(reader) == list("345678"), "batches after stop_batch stay"
    reader.forget(stop_batch=4)
    assert taken(reader) == list("5678"), "batches that duplicates are found by stay too"
    append(log, "7", "9")
    reader = intake(tmp_path, remembered=3)
    assert take_all(reader) == list("56789")
    assert reader.counts == {"used": 9, "duplicate": 1}
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == [
        *(f"batch-{number:08d}.jsonl" for number in (2, 3, 4)), "cursor.json", "quarantine-00000004.jsonl"
    ]  # fmt: skip


def test_stored_records_keep_the_logged_distribution_and_the_pseudonym(tmp_path):
    tokens = ids("ok")
    rows = [{f"token_id:{token}": -0.1, "token_id:9": -4.0, "token_id:8": -5.0} for token in tokens]
    rows[1].popitem()
    logged = {"tokens": list(rows[0])[:1] + list(rows[1])[:1], "token_logprobs": [-0.1, -0.1], "top_logprobs": rows}
    line = completion("Q", "ok", logprobs=logged, token_ids=tokens)
    line["request"]["user"] = "somebody"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.jsonl").write_text(json.dumps(line | {"domain": "code"}) + "\n")
    reader = intake(tmp_path)
    reader.take()
    (served,) = reader.served()
    assert served.record.domain == "code"
    assert served.record.tokens == [*ids("Q"), *tokens]
    assert served.record.loss_mask == [False, True, True]
    assert served.record.logged.ids_NK.tolist() == [[tokens[0], 9, 8], [tokens[1], 9, -1]]
    assert np.isneginf(served.record.logged.log_probs_NK[1, 2])
    assert served.user
    assert "somebody" not in (tmp_path / "taken" / "batch-00000000.jsonl").read_text()


def test_other_settings_need_another_folder(tmp_path):
    append(tmp_path / "logs" / "a.jsonl", "1")
    intake(tmp_path).take()
    with pytest.raises(DataError, match="written with other settings"):
        intake(tmp_path, redact=False)


def _read_forever(tmp_path: Path) -> None:
    reader = intake(tmp_path)
    while True:
        if reader.take(max_lines=7) is None:
            time.sleep(0.001)


def rename_on(log: Path, number: int) -> None:
    log.rename(log.with_name(f"a.jsonl.{number}"))
    append(log)


def copy_on(log: Path, number: int) -> None:
    shutil.copy(log, log.with_name(f"a.jsonl.{number}"))
    os.truncate(log, 0)


def survive(tmp_path: Path, *, rotate: Callable[[Path, int], None], kills: int) -> None:
    rng = random.Random(0)
    log, cursor = tmp_path / "logs" / "a.jsonl", tmp_path / "taken" / "cursor.json"
    append(log, "first")
    process = multiprocessing.get_context("fork")
    names, rotations = ["first"], 0

    def batches() -> int:
        return json.loads(cursor.read_text())["batches"] if cursor.exists() else 0

    for _ in range(kills):
        before, until = batches(), None
        child = process.Process(target=_read_forever, args=(tmp_path,))
        child.start()
        begun = time.monotonic()
        # The time counts from the first batch, because the machine may be slow.
        while until is None or time.monotonic() < until:
            assert child.is_alive(), "the reader ended before it was killed"
            assert until is not None or time.monotonic() < begun + 120, "the reader read nothing"
            names.append(f"line {len(names)}")
            append(log, names[-1])
            time.sleep(0.001)
            if rng.random() < 0.05:
                rotations += 1
                rotate(log, 1_000_000 - rotations)
            if until is None and batches() > before:
                until = time.monotonic() + rng.uniform(0.02, 0.2)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the reader ended before it was killed"
    reader = intake(tmp_path)
    found = take_all(reader)
    assert sorted(found) == sorted(names)  # No line is lost or read twice.
    assert reader.counts == {"used": len(names)}


@pytest.mark.parametrize("rotate", [rename_on, copy_on])
def test_a_kill_neither_loses_nor_duplicates_a_record(tmp_path, rotate):
    survive(tmp_path, rotate=rotate, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("rotate", [rename_on, copy_on])
def test_many_kills_neither_lose_nor_duplicate_a_record(tmp_path, rotate):
    survive(tmp_path, rotate=rotate, kills=100)
