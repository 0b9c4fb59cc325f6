"""Publishing: `current` is always a whole drafter, whenever the publisher is killed; a step back is one switch."""

from __future__ import annotations

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
    with pytest.raises(CheckpointError, match="nothing is published"):
        versions.current()
    publish_first(versions, start(tmp_path))
    publish_first(versions, start(tmp_path))
    with pytest.raises(CheckpointError, match="first version"):
        versions.rollback()
    for number in (1, 2, 3):
        versions.publish(versions.add(lambda f, n=number: write(f, number=n), update=number))
    assert versions.names() == ["0002", "0003"]
    assert versions.made_by(3) == "0003"
    assert versions.rollback() == ("0003", "0002")
    assert os.readlink(tmp_path / "drafters" / "current") == "0002"
    with pytest.raises(CheckpointError, match="no longer kept"):
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


def test_a_history_with_half_a_line_is_read_and_gone_on_with(tmp_path):
    versions = Versions(tmp_path / "drafters")
    publish_first(versions, start(tmp_path))
    path = tmp_path / "drafters" / "history.jsonl"
    path.write_text(path.read_text() + '{"event": "publ')
    versions.note("rejected", update=4)
    assert [one["event"] for one in versions.history()] == ["published", "rejected"]


def publish_for_ever(folder: Path) -> None:
    versions = Versions(folder, keep=3)
    versions.mend()
    number = max(map(int, versions.names())) + 1
    while True:
        versions.publish(versions.add(lambda f, n=number: write(f, number=n), update=number))
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
        assert process.exitcode == -signal.SIGKILL, "the publisher had fallen before it was killed"
        assert whole(folder / "current")
        versions = Versions(folder)
        versions.mend()
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        switched = [one for one in versions.history() if one["event"] == "published"]
        assert switched[-1]["version"] == versions.current()
