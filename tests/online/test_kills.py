"""Learner and publisher are killed at seeded moments: no request is lost or read twice, and `current` always loads."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from drafttrain.checkpoint import About, read_drafter
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.export.hf import export_hf
from drafttrain.online.run_files import metrics
from drafttrain.online.versions import Versions, publish_first
from drafttrain.target_model import Target
from tests.conftest import random_llama
from tests.online.test_loop import online_run, prompts, serve, start

KILLS = [pytest.param(3, marks=pytest.mark.processes), pytest.param(20, marks=pytest.mark.slow)]
Moments = Iterator[float]
"""Seconds from when a process is at work until it is killed."""


def moments(kind: str, *, longest: float) -> Moments:
    draws = random.Random(kind)
    while True:
        yield draws.uniform(0, longest)


def print_row(kind: str, kills: int, *, lost: int, twice: int, unloadable: int | str, of: str) -> None:
    print(f"\n| {kind} | {kills} | {of} | {lost} | {twice} | {unloadable} |")


def killed(work: Callable[[], None], begun: Callable[[], object], moment: float) -> None:
    """Do work in another process. Kill it some time after the value of `begun` has changed."""

    def quiet() -> None:
        # All processes share the lock of the progress bar: one that is killed while it draws would never release it.
        disable_progress_bar()
        work()

    before = begun()
    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    until = time.monotonic() + 300
    while begun() == before:
        assert process.is_alive(), "the work ended by itself"
        assert time.monotonic() < until, "the work did not begin, so a kill would prove nothing"
        time.sleep(0.001)
    time.sleep(moment)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def stamp(path: Path) -> int:
    """Return when a file was last replaced; 0: it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def numbered(target: Target, folder: Path, *, number: int) -> None:
    """Write a drafter with a number in both its weights and its metadata."""
    drafter = CausalLMDrafter(random_llama(seed=1))
    with torch.no_grad():
        drafter.model.get_input_embeddings().weight[0, 0] = number
    folder.mkdir(parents=True, exist_ok=True)
    drafter.save(folder / "weights")
    about = About("causal_lm", target.name, target.fingerprint, target.tokenizer_fingerprint, 257, number)
    export_hf(folder / "weights", folder / "export", tokenizer=target.tokenizer, about=about, dtype="float32")
    for path in (folder / "export").iterdir():
        path.rename(folder / path.name)


def publish_for_ever(target: Target, folder: Path) -> None:
    versions = Versions(folder, keep=3)
    versions.repair()
    for number in count(max(map(int, versions.names())) + 1):
        version = versions.add(lambda f, n=number: numbered(target, f, number=n), update=number)
        versions.publish(version)
        versions.prune(held=version)


@pytest.mark.parametrize("kills", KILLS)
def test_current_loads_after_a_publisher_was_killed(tmp_path: Path, tiny_target: Target, kills: int) -> None:
    folder, when = tmp_path / "drafters", moments("publish", longest=0.2)
    numbered(tiny_target, tmp_path / "start", number=0)
    publish_first(Versions(folder), tmp_path / "start")
    for _ in range(kills):
        killed(lambda: publish_for_ever(tiny_target, folder), lambda: os.readlink(folder / "current"), next(when))
        # Before any repair, as a serving stack would find it.
        drafter = read_drafter((folder / "current").resolve(), tiny_target)
        assert int(drafter.model.get_input_embeddings().weight[0, 0]) == int(os.readlink(folder / "current"))
    versions = Versions(folder)
    versions.repair()
    assert [one["version"] for one in versions.history() if one["event"] == "published"][-1] == versions.current()
    print_row("publish", kills, lost=0, twice=0, unloadable=0, of=f"{int(versions.current())} versions published")
    assert int(versions.current()) >= kills


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_learner_ends_as_an_uninterrupted_one(tmp_path: Path, tiny_target: Target, kills: int) -> None:
    changes = {
        "steps": 8,
        "every_requests": 8,
        "max_lines": 5,
        "min_held_out": 5,
        "resamples": 200,
        "significance": 0.2,
    }
    first, whole, place = start(tmp_path, tiny_target), tmp_path / "whole", tmp_path / "killed"
    drafters = place / "run" / "drafters"
    online_run(place, tiny_target, first, **changes)
    whole.mkdir()
    serve(tiny_target, drafters, whole / "logs" / "a.jsonl", prompts(0, 12 * kills))
    lines = (whole / "logs" / "a.jsonl").read_text().splitlines(keepends=True)
    (place / "logs").mkdir()
    when = moments("learner", longest=0.3)

    def learn_on() -> None:
        run = online_run(place, tiny_target, first, **changes)
        while True:
            run.learn_once()
            time.sleep(0.001)

    for number in range(kills):
        with (place / "logs" / "a.jsonl").open("a") as file:
            file.writelines(lines[12 * number : 12 * (number + 1)])
        killed(learn_on, lambda: stamp(place / "run" / "online" / "state.pt"), next(when))
        read_drafter((drafters / "current").resolve(), tiny_target)
    ends = []
    for folder in (place, whole):
        run = online_run(folder, tiny_target, first, **changes)
        run.learn_once()
        ends.append(run)
    after_kills, uninterrupted = (run.routes[""] for run in ends)
    found = Counter(one.record.id for one in ends[0].intake.served())
    lost, twice = len(lines) - len(found), sum(times > 1 for times in found.values())
    print_row("learner", kills, lost=lost, twice=twice, unloadable=0, of=f"{len(lines)} requests")
    assert (lost, twice, after_kills.counts["requests"]) == (0, 0, len(lines))
    rows = [[(row["update"], row.get("promoted")) for row in metrics(folder / "run")] for folder in (place, whole)]
    assert rows[0] == rows[1]
    assert any(promoted for _, promoted in rows[0])
    assert after_kills.versions.current() == uninterrupted.versions.current()
    for name, value in uninterrupted.learner.state()["drafter"].items():
        assert torch.equal(value, after_kills.learner.state()["drafter"][name]), name
