"""Publishing: `current` is always a whole drafter, whenever the publisher is killed; a step back is one switch."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from drafttrain.core.errors import CheckpointError
from drafttrain.online.versions import Versions, publish_first


def write(folder: Path, *, number: int) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(json.dumps({"number": number}) * 200)


def whole(folder: Path) -> bool:
    """Tell whether both files of a version are there and of one publish."""
    texts = {(folder / name).read_text() for name in ("config.json", "model.safetensors")}
    return len(texts) == 1


def start(tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    folder.mkdir(exist_ok=True)
    write(folder, number=0)
    return folder


def test_versions_are_published_in_turn_and_taken_back(tmp_path):
    versions = Versions(tmp_path / "drafters", keep=2)
    with pytest.raises(CheckpointError, match="no published version"):
        versions.current()
    publish_first(versions, start(tmp_path))
    publish_first(versions, start(tmp_path))
    with pytest.raises(CheckpointError, match="first version"):
        versions.rollback()
    for number in (1, 2, 3):
        versions.publish(versions.add(lambda f, n=number: write(f, number=n), update=number))
    versions.prune(held="0001")
    assert versions.names() == ["0001", "0002", "0003"]
    versions.prune(held="0003")
    assert versions.names() == ["0002", "0003"]
    assert versions.of_update(3) == "0003"
    assert versions.rollback() == ("0003", "0002")
    assert os.readlink(tmp_path / "drafters" / "current") == "0002"
    with pytest.raises(CheckpointError, match="was removed"):
        versions.rollback()
    assert [one["event"] for one in versions.history()] == ["published"] * 4 + ["rolled_back"]


def test_the_hook_gets_the_version_and_its_failure_changes_nothing(tmp_path):
    said = tmp_path / "said"
    code = f"import sys; open({str(said)!r}, 'a').write(' '.join(sys.argv[1:]))"
    versions = Versions(tmp_path / "drafters", hook=[sys.executable, "-c", code, "{version}", "{path}; rm -rf x"])
    publish_first(versions, start(tmp_path))
    assert said.read_text() == f"0000 {(tmp_path / 'drafters' / '0000').resolve()}; rm -rf x"
    failing = Versions(tmp_path / "drafters", hook=[sys.executable, "-c", "raise SystemExit('no server')"])
    failing.publish(failing.add(lambda f: write(f, number=1), update=1))
    assert failing.current() == "0001"
    assert failing.history()[-1]["event"] == "hook_failed"
    assert "no server" in failing.history()[-1]["problem"]


def test_what_the_hook_tells_last_is_what_is_served(tmp_path):
    # It takes back what it was told of, as one that tries the drafter out might.
    said, folder = tmp_path / "said", tmp_path / "drafters"
    code = (
        "import sys; from pathlib import Path; from drafttrain.online.versions import Versions;"
        f"sys.argv[1] == '0001' and Versions(Path({str(folder)!r})).rollback();"
        f"open({str(said)!r}, 'a').write(sys.argv[1] + ' ')"
    )
    versions = Versions(folder, hook=[sys.executable, "-c", code, "{version}"])
    publish_first(versions, start(tmp_path))
    versions.publish(versions.add(lambda f: write(f, number=1), update=1))
    assert versions.current() == "0000"
    assert said.read_text().split() == ["0000", "0001", "0000"]


def test_a_hook_that_leaves_a_server_running_has_ended_when_it_ended(tmp_path):
    hook = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path / 'server'}"]
    versions = Versions(tmp_path / "drafters", hook=hook, hook_timeout_seconds=20)
    publish_first(versions, start(tmp_path))
    # It is still there, or nothing is proven.
    os.kill(int((tmp_path / "server").read_text()), signal.SIGKILL)
    assert [one["event"] for one in versions.history()] == ["published", "hook_ran"]


def test_a_hook_that_a_kill_kept_from_running_is_run_at_the_next_start(tmp_path):
    said = tmp_path / "said"
    hook = [sys.executable, "-c", f"import sys; open({str(said)!r}, 'a').write(sys.argv[1] + ' ')", "{version}"]
    versions = Versions(tmp_path / "drafters", hook=hook)
    publish_first(versions, start(tmp_path))
    # As far as a publish that is killed before its hook comes.
    quiet = Versions(tmp_path / "drafters")
    quiet.publish(quiet.add(lambda f: write(f, number=1), update=1))
    for _ in range(2):
        Versions(tmp_path / "drafters", hook=hook).repair()
    assert said.read_text().split() == ["0000", "0001"]


def test_a_removal_that_was_killed_half_way_leaves_no_version(tmp_path, monkeypatch):
    versions = Versions(tmp_path / "drafters", keep=2)
    publish_first(versions, start(tmp_path))
    refused = versions.add(lambda f: write(f, number=1), update=1)
    with monkeypatch.context() as killed:
        # The first file goes, and then the process.
        killed.setattr("shutil.rmtree", lambda path, **_: (Path(path) / "published.json").unlink(missing_ok=True))
        versions.remove(refused)
    versions.repair()
    assert versions.names() == ["0000"]
    assert versions.of_update(1) is None
    assert [path.name for path in versions.folder.iterdir() if path.name.startswith(".")] == []


def test_a_candidate_is_published_only_in_place_of_what_it_was_compared_with(tmp_path):
    versions = Versions(tmp_path / "drafters")
    publish_first(versions, start(tmp_path))
    versions.publish(versions.add(lambda f: write(f, number=1), update=1))
    candidate = versions.add(lambda f: write(f, number=2), update=2)
    versions.rollback()
    assert not versions.publish(candidate, instead_of="0001")
    assert versions.current() == "0000"
    assert versions.publish(candidate, instead_of="0000")
    assert versions.current() == candidate


def roll_back_for_ever(folder: Path) -> None:
    versions = Versions(folder, keep=2)
    while True:
        with contextlib.suppress(CheckpointError):
            versions.rollback()


def test_a_step_back_in_the_midst_of_a_publish_leaves_current_whole(tmp_path):
    folder = tmp_path / "drafters"
    publish_first(Versions(folder), start(tmp_path))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one, args=(folder,)) for one in (publish_for_ever, roll_back_for_ever)]
    for process in processes:
        process.start()
    try:
        versions, until = Versions(folder), time.monotonic() + 60
        steps = 0
        while steps < 40 and time.monotonic() < until:
            assert all(process.is_alive() for process in processes)
            for _ in range(100):
                served = versions.current()
                assert versions.path(served).is_dir() or versions.current() != served
            steps = sum(one["event"] == "rolled_back" for one in versions.history())
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert steps >= 40
    assert whole(folder / "current")


def test_a_history_with_half_a_line_is_read_and_gone_on_with(tmp_path):
    versions = Versions(tmp_path / "drafters")
    publish_first(versions, start(tmp_path))
    path = tmp_path / "drafters" / "history.jsonl"
    path.write_text(path.read_text() + '{"event": "publ')
    versions.log_event("rejected", update=4)
    assert [one["event"] for one in versions.history()] == ["published", "rejected"]


def publish_for_ever(folder: Path) -> None:
    versions = Versions(folder, keep=3)
    versions.repair()
    number = max(map(int, versions.names())) + 1
    while True:
        version = versions.add(lambda f, n=number: write(f, number=n), update=number)
        versions.publish(version)
        versions.prune(held=version)
        number += 1


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_current_is_whole_after_a_kill_at_any_moment(tmp_path, moments):
    folder = tmp_path / "drafters"
    publish_first(Versions(folder), start(tmp_path))
    draws = random.Random(moments)
    context = multiprocessing.get_context("fork")
    lives = 0
    # On a busy machine all of the first lives may end before anything is published: these prove nothing.
    while lives < moments or Versions(folder).current() == "0000":
        lives += 1
        process = context.Process(target=publish_for_ever, args=(folder,))
        process.start()
        until = time.monotonic() + draws.uniform(0.02, 0.12)
        while time.monotonic() < until:
            seen = (folder / "current").resolve()
            try:
                assert whole(seen)
            except FileNotFoundError:
                # So many versions were published since that it is one of those no longer kept.
                assert (folder / "current").resolve() != seen
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the publisher fell before it was killed"
        assert whole(folder / "current")
        versions = Versions(folder)
        versions.repair()
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        switched = [one for one in versions.history() if one["event"] == "published"]
        assert switched[-1]["version"] == versions.current()
