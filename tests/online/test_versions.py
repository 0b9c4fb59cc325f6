"""Publishing: `current` is always a complete drafter, even if the publisher is killed. A rollback is one switch."""

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


def is_complete(folder: Path) -> bool:
    """Return whether both files of a version are there and from the same publish."""
    texts = {(folder / name).read_text() for name in ("config.json", "model.safetensors")}
    return len(texts) == 1


def start(tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    folder.mkdir(exist_ok=True)
    write(folder, number=0)
    return folder


def test_versions_are_published_in_order_and_rolled_back(tmp_path):
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
    output = tmp_path / "output"
    code = f"import sys; open({str(output)!r}, 'a').write(' '.join(sys.argv[1:]))"
    versions = Versions(tmp_path / "drafters", hook=[sys.executable, "-c", code, "{version}", "{path}; rm -rf x"])
    publish_first(versions, start(tmp_path))
    assert output.read_text() == f"0000 {(tmp_path / 'drafters' / '0000').resolve()}; rm -rf x"
    failing = Versions(tmp_path / "drafters", hook=[sys.executable, "-c", "raise SystemExit('no server')"])
    failing.publish(failing.add(lambda f: write(f, number=1), update=1))
    assert failing.current() == "0001"
    assert failing.history()[-1]["event"] == "hook_failed"
    assert "no server" in failing.history()[-1]["problem"]


def test_the_last_run_of_the_hook_gets_the_served_version(tmp_path):
    # This hook rolls the new version back, as one that tests the drafter might.
    output, folder = tmp_path / "output", tmp_path / "drafters"
    code = (
        "import sys; from pathlib import Path; from drafttrain.online.versions import Versions;"
        f"sys.argv[1] == '0001' and Versions(Path({str(folder)!r})).rollback();"
        f"open({str(output)!r}, 'a').write(sys.argv[1] + ' ')"
    )
    versions = Versions(folder, hook=[sys.executable, "-c", code, "{version}"])
    publish_first(versions, start(tmp_path))
    versions.publish(versions.add(lambda f: write(f, number=1), update=1))
    assert versions.current() == "0000"
    assert output.read_text().split() == ["0000", "0001", "0000"]


def test_a_hook_may_leave_a_server_running(tmp_path):
    hook = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path / 'server'}"]
    versions = Versions(tmp_path / "drafters", hook=hook, hook_timeout_seconds=20)
    publish_first(versions, start(tmp_path))
    # The server must still be running, else the test proves nothing.
    os.kill(int((tmp_path / "server").read_text()), signal.SIGKILL)
    assert [one["event"] for one in versions.history()] == ["published", "hook_ran"]


def test_a_hook_that_did_not_run_because_of_a_kill_runs_at_the_next_start(tmp_path):
    output = tmp_path / "output"
    hook = [sys.executable, "-c", f"import sys; open({str(output)!r}, 'a').write(sys.argv[1] + ' ')", "{version}"]
    versions = Versions(tmp_path / "drafters", hook=hook)
    publish_first(versions, start(tmp_path))
    # Like a publish that is killed before its hook runs.
    quiet = Versions(tmp_path / "drafters")
    quiet.publish(quiet.add(lambda f: write(f, number=1), update=1))
    for _ in range(2):
        Versions(tmp_path / "drafters", hook=hook).repair()
    assert output.read_text().split() == ["0000", "0001"]


def test_a_hook_that_an_older_version_ran_does_not_run_again(tmp_path):
    output = tmp_path / "output"
    hook = [sys.executable, "-c", f"open({str(output)!r}, 'a').write('ran ')"]
    versions = Versions(tmp_path / "drafters", hook=hook)
    publish_first(versions, start(tmp_path))
    history = versions.folder / "history.jsonl"
    history.write_text(history.read_text().replace('"hook_ran"', '"told"'))
    versions.repair()
    assert output.read_text() == "ran "


def test_an_interrupted_removal_leaves_no_version(tmp_path, monkeypatch):
    versions = Versions(tmp_path / "drafters", keep=2)
    publish_first(versions, start(tmp_path))
    refused = versions.add(lambda f: write(f, number=1), update=1)
    with monkeypatch.context() as killed:
        # The process is killed after the first file is removed.
        killed.setattr("shutil.rmtree", lambda path, **_: (Path(path) / "published.json").unlink(missing_ok=True))
        versions.remove(refused)
    versions.repair()
    assert versions.names() == ["0000"]
    assert versions.of_update(1) is None
    assert [path.name for path in versions.folder.iterdir() if path.name.startswith(".")] == []


def test_a_candidate_replaces_only_the_version_it_was_compared_with(tmp_path):
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


def test_a_rollback_during_a_publish_leaves_current_complete(tmp_path):
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
    assert is_complete(folder / "current")


def test_a_history_with_an_incomplete_line_is_read_and_continued(tmp_path):
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
def test_current_is_complete_after_a_kill_at_any_moment(tmp_path, moments):
    folder = tmp_path / "drafters"
    publish_first(Versions(folder), start(tmp_path))
    draws = random.Random(moments)
    context = multiprocessing.get_context("fork")
    lives = 0
    # On a busy machine the first processes may be killed before they publish anything: those prove nothing.
    while lives < moments or Versions(folder).current() == "0000":
        lives += 1
        process = context.Process(target=publish_for_ever, args=(folder,))
        process.start()
        until = time.monotonic() + draws.uniform(0.02, 0.12)
        while time.monotonic() < until:
            seen = (folder / "current").resolve()
            try:
                assert is_complete(seen)
            except FileNotFoundError:
                # So many versions were published since that this one was removed.
                assert (folder / "current").resolve() != seen
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the publisher ended before it was killed"
        assert is_complete(folder / "current")
        versions = Versions(folder)
        versions.repair()
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        switched = [one for one in versions.history() if one["event"] == "published"]
        assert switched[-1]["version"] == versions.current()
