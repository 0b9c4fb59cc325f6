"""Checkpoints that a thread writes: what they hold, who waits for them, and that no error of theirs is lost."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import DrafttrainError, Interrupted
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.training import checkpoint_file, preflight
from drafttrain.training.checkpoint_file import CheckpointFile, on_host
from drafttrain.training.host_memory import free_host_bytes
from drafttrain.training.preflight import has_room_for_a_copy
from tests.training.layouts import SlowDisk, curve, run, wait_for_checkpoint
from tests.training.test_layouts import in_processes

BEFORE = "step-00000003.ckpt"


class Acting(CausalLMDrafter):
    """Acts at the beginning of some steps."""

    acts: ClassVar[dict[int, Callable[[], Any]]] = {}

    def forward(self, batch: DraftBatch) -> Any:
        self.acts.get(batch.step, lambda: None)()
        return super().forward(batch)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a checkpoint, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let nothing be written before the event that is returned."""
    event, save = threading.Event(), torch.save

    def later(*arguments: Any, **named: Any) -> None:
        assert event.wait(60)
        save(*arguments, **named)

    monkeypatch.setattr(torch, "save", later)
    return event


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_checkpoint_holds_its_own_step_though_it_is_written_two_steps_later(
    tmp_path: Path, stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", stage=stage, steps=3)
    event = held_back(monkeypatch)

    def look() -> None:
        assert not (tmp_path / "later" / "checkpoints" / BEFORE).exists(), "training went on before it was written"
        event.set()

    Acting.acts = {4: look}
    run(tmp_path / "later", stage=stage, steps=5, drafter=Acting, checkpoint_every_steps=3)
    whole, later = (torch.load(tmp_path / name / "checkpoints" / BEFORE) for name in ("whole", "later"))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert len(tensors_of(whole[name])) == len(tensors_of(later[name]))
        for a, b in zip(tensors_of(whole[name]), tensors_of(later[name]), strict=True):
            assert torch.equal(a, b), name
    assert whole["global_step"] == later["global_step"] == 3
    assert whole["lr_schedulers"] == later["lr_schedulers"]


def test_control_without_a_copy_it_holds_another_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", steps=3)
    event = held_back(monkeypatch)
    monkeypatch.setattr(checkpoint_file, "on_host", lambda checkpoint: checkpoint)
    Acting.acts = {4: event.set}
    run(tmp_path / "later", steps=5, drafter=Acting, checkpoint_every_steps=3)
    whole, later = (torch.load(tmp_path / name / "checkpoints" / BEFORE) for name in ("whole", "later"))
    pairs = zip(tensors_of(whole["state_dict"]), tensors_of(later["state_dict"]), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_the_next_checkpoint_waits_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk delays checkpoints, and none is left out or written in another order."""
    monkeypatch.setattr(os, "fsync", SlowDisk(0.2))
    seen: list[int] = []
    Acting.acts = {
        step: lambda: seen.append(sum(t.name == "checkpoint" for t in threading.enumerate())) for step in range(8)
    }
    run(tmp_path / "slow", steps=6, drafter=Acting, checkpoint_every_steps=1)
    assert max(seen) == 1
    assert curve(tmp_path / "slow") == run(tmp_path / "whole", steps=6)
    kept = sorted(path.name for path in (tmp_path / "slow" / "checkpoints").iterdir())
    assert kept == ["step-00000005.ckpt", "step-00000006.ckpt"]


@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("at", [3, 6], ids=["on the way", "the last"])
def test_a_folder_that_is_gone_is_an_error_of_the_training(tmp_path: Path, stage: int | None, at: int) -> None:
    def remove() -> None:
        wait_for_checkpoint()
        shutil.rmtree(tmp_path / "gone" / "checkpoints")

    Acting.acts = {at - 1: remove}
    with pytest.raises(DrafttrainError, match=rf"step-0000000{at}\.ckpt.* could not be written \(No such file"):
        run(tmp_path / "gone", stage=stage, steps=6, drafter=Acting, checkpoint_every_steps=3)
    assert not (tmp_path / "gone" / "train.json").exists()


def test_a_request_to_stop_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", SlowDisk(0.2))
    Acting.acts = {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(Interrupted, match="stopped at step 5"):
        run(tmp_path / "stopped", steps=9, drafter=Acting)
    kept = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert kept == [BEFORE, "step-00000005.ckpt"]
    monkeypatch.undo()
    run(tmp_path / "stopped", steps=9)
    assert curve(tmp_path / "stopped") == run(tmp_path / "whole", steps=9)


def test_a_training_that_fails_leaves_its_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(os, "fsync", SlowDisk(0.2))
    Acting.acts = {3: fail}
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "failed", steps=9, drafter=Acting)
    assert [path.name for path in (tmp_path / "failed" / "checkpoints").iterdir()] == [BEFORE]


def test_an_error_of_the_disk_does_not_hide_that_of_the_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        wait_for_checkpoint()
        raise RuntimeError("something else")

    Acting.acts = {2: lambda: shutil.rmtree(tmp_path / "failed" / "checkpoints"), 3: fail}
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "failed", steps=9, drafter=Acting)
    assert "a checkpoint could not be written" in " ".join(capfd.readouterr().err.split())


def test_a_disk_that_takes_nothing_any_more_is_given_up_and_a_slow_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_file, "PIECE_BYTES", 100)
    monkeypatch.setattr(os, "fsync", SlowDisk(0.01))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    slow = CheckpointFile(stall_seconds=1.0)
    slow.write({"weight": torch.zeros(4000)}, folder / "slow.ckpt")
    assert slow.finished() is None, "some 160 pieces took longer than one may"
    assert torch.load(folder / "slow.ckpt")["weight"].shape == (4000,)
    event = held_back(monkeypatch)
    stalled = CheckpointFile(stall_seconds=0.2)
    stalled.write({"weight": torch.zeros(4)}, folder / "stalled.ckpt")
    with pytest.raises(DrafttrainError, match=r"stalled\.ckpt: the disk accepted no data for 0\.2 s"):
        stalled.finished()
    event.set()


def test_tied_weights_are_copied_once() -> None:
    weight = torch.arange(6.0)
    copied = on_host({"a": weight, "b": [weight.detach(), weight[:3]]})
    weight.zero_()
    assert copied["a"] is copied["b"][0]
    assert (copied["a"].tolist(), copied["b"][1].tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])


def test_without_memory_for_a_copy_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "free_host_bytes", lambda: 10)
    monkeypatch.setattr(os, "fsync", SlowDisk(0.1))
    alive: list[bool] = []
    Acting.acts = {3: lambda: alive.append(any(t.name == "checkpoint" for t in threading.enumerate()))}
    run(tmp_path / "waits", steps=6, drafter=Acting)
    assert "no room for a copy, so training waits" in " ".join(capfd.readouterr().err.split())
    assert alive == [False]
    assert curve(tmp_path / "waits") == run(tmp_path / "whole", steps=6)


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal: 100 kB\nMemAvailable: 64 kB\n")
    assert free_host_bytes(machine, tmp_path) == 65536
    for name, text in {
        "memory.max": "50000\n",
        "memory.current": "40000\n",
        "memory.stat": "anon 9\ninactive_file 5000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert free_host_bytes(machine, tmp_path) == 15000
    assert free_host_bytes(tmp_path / "absent", tmp_path / "absent") is None
    monkeypatch.setattr(preflight, "free_host_bytes", lambda: 120)
    assert (has_room_for_a_copy(10), has_room_for_a_copy(11)) == (True, False)


@pytest.mark.processes
def test_other_processes_outwait_a_disk_that_is_slower_than_their_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any wait in a collective ends after 8 seconds; the disk takes more for a checkpoint, and less for a piece."""
    monkeypatch.setenv("TEST_TIMEOUT_SECONDS", "8")
    slow = {"slow_disk": 3.0, "piece_bytes": 60_000, "timeout_seconds": 8.0}
    layouts = [(tmp_path / f"{stage}", {"stage": stage, "steps": 3, **slow}) for stage in (0, 2)]
    in_processes(layouts)
    for folder, _ in layouts:
        (path,) = (folder / "checkpoints").iterdir()
        assert path.name == BEFORE
        assert path.stat().st_size > 3 * 60_000
