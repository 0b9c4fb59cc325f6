"""A disk that fills up while a training saves: earlier files stay, the run reports it, and stops or continues as set."""

import json
import math
import resource
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from drafttrain.core import console
from drafttrain.core.errors import DrafttrainError
from drafttrain.training.result import folder_of_step, kept_steps
from drafttrain.training.validation import OF_DRAFTERS
from tests.training.layouts import OnASmallDisk, curve, limit_files, run, small_files

NO_CHECKPOINT = 150_000
"""Bytes: the weights fit, the optimizer's states with them do not."""


@pytest.fixture(autouse=True)
def _no_limit_is_left() -> Iterator[None]:
    yield
    left = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limit_files(None)
    assert left == resource.getrlimit(resource.RLIMIT_FSIZE)[0], "pytest has written the test's result under a limit"


@pytest.mark.parametrize("stage", [None, 2])
def test_a_full_disk_leaves_the_checkpoint_before_and_stops(
    tmp_path: Path, stage: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    OnASmallDisk.limits = dict.fromkeys(range(3, 9), NO_CHECKPOINT)
    said = (
        r"no room for .*step-00000006\.ckpt.* \(File too large\); the one before it, step-00000003\.ckpt, is untouched"
    )
    with pytest.raises(DrafttrainError, match=said):
        run(tmp_path / "full", stage=stage, steps=9, drafter=OnASmallDisk)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000003.ckpt"]
    run(tmp_path / "full", stage=stage, steps=9)
    assert "continuing from" in capfd.readouterr().err
    assert curve(tmp_path / "full") == run(tmp_path / "whole", stage=stage, steps=9)


def test_a_run_continues_without_its_checkpoint_if_the_recipe_allows_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    OnASmallDisk.limits = dict.fromkeys((3, 4, 5), NO_CHECKPOINT)
    run(tmp_path / "full", steps=9, drafter=OnASmallDisk, on_full_disk="continue")
    kept = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert kept == ["step-00000003.ckpt", "step-00000009.ckpt"]
    assert "Continuing without it" in capfd.readouterr().err
    assert curve(tmp_path / "full") == run(tmp_path / "whole", steps=9)


def test_a_line_that_had_no_room_ends_nothing_and_is_there_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(console, "stderr", Console(file=log))
        with small_files(0):
            console.say("no room")
            with pytest.raises(OSError, match="File too large"):
                console.stderr.print("the control")
        console.say("some room")
    assert [line in (tmp_path / "log").read_text() for line in ("no room", "some room")] == [True, True]


def test_rows_that_had_no_room_are_written_when_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a slow machine that logs every step: the log has no room either.
    monkeypatch.setattr(console, "PLAIN_LINE_SECONDS", 0.0)
    OnASmallDisk.limits = dict.fromkeys((3, 4), 300)
    run(tmp_path / "full", steps=8, drafter=OnASmallDisk, on_full_disk="continue", checkpoint_every_steps=100)
    assert curve(tmp_path / "full") == run(tmp_path / "whole", steps=8, checkpoint_every_steps=100)
    with pytest.raises(DrafttrainError, match=r"metrics\.csv: File too large"):
        run(tmp_path / "stops", steps=8, drafter=OnASmallDisk, checkpoint_every_steps=100)
    # What was there is whole, and the run can go on.
    assert curve(tmp_path / "stops") == curve(tmp_path / "full")[: len(curve(tmp_path / "stops"))]


def test_the_best_weights_that_had_no_room_are_not_called_the_best(tmp_path: Path) -> None:
    """The second of three measurements is the highest, and its weights cannot be written."""

    def estimates() -> Any:
        values = iter([1.0, 3.0, 2.0])

        def estimate(_: Any) -> dict[str, Any]:
            value = next(values)
            limit_files(5_000 if value == 3.0 else None)
            return dict.fromkeys(OF_DRAFTERS, value) | {"message": "measured"}

        return estimate

    settings: dict[str, Any] = {"steps": 4, "eval_every_steps": 2, "checkpoint_every_steps": 100}
    with pytest.raises(DrafttrainError, match=r"the best weights so far \(step 2\).*of step 0, stays"):
        run(tmp_path / "stops", estimate=estimates(), **settings)
    run(tmp_path / "full", estimate=estimates(), on_full_disk="continue", **settings)
    assert '"best_step": 4' in (tmp_path / "full" / "train.json").read_text()
    names = ("best/step-00000004", "last")
    best, last = (load_file(tmp_path / "full" / name / "model.safetensors") for name in names)
    assert all((best[name] == last[name]).all() for name in last)


def test_the_best_steps_keep_their_weights_in_order(tmp_path: Path) -> None:
    """Of five measurements, two of them equal and one no number, the three highest stay; the earlier of equal ones is first."""
    values = dict(zip(range(0, 10, 2), (1.0, 3.0, math.nan, 2.0, 3.0), strict=True))
    measured = cycle(values.values())

    def estimate(_: Any) -> dict[str, Any]:
        return dict.fromkeys(OF_DRAFTERS, next(measured)) | {"message": "measured"}

    folder = tmp_path / "run"
    run(folder, steps=8, estimate=estimate, eval_every_steps=2, checkpoint_every_steps=100, keep_best=3)
    kept = kept_steps(folder)
    assert [(one["step"], one["block_efficiency"]) for one in kept] == [(2, 3.0), (8, 3.0), (6, 2.0)]
    assert sorted(path.name for path in (folder / "best").iterdir()) == [f"step-{step:08d}" for step in (2, 6, 8)]
    last, eighth = (load_file(path / "model.safetensors") for path in (folder / "last", folder_of_step(folder, 8)))
    assert all((last[name] == eighth[name]).all() for name in last)
    assert json.loads((folder / "train.json").read_text())["drafter"] == "best/step-00000002"
    # What a kill between two of these left, of a step that was the best before or is not called so yet, goes.
    shutil.copytree(folder_of_step(folder, 2), folder_of_step(folder, 4))
    run(folder, steps=8, estimate=estimate, eval_every_steps=2, checkpoint_every_steps=100, keep_best=3)
    assert sorted(path.name for path in (folder / "best").iterdir()) == [f"step-{step:08d}" for step in (2, 6, 8)]
