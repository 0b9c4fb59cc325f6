"""A process that dies under a launcher that restarts: all begin again from the last checkpoint, and the curve is the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.training import waiting_loss
from tests.training.kills import Life, differences, kill, uninterrupted, write_recipe

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]


@pytest.mark.slow
def test_ranks_whose_parent_is_killed_leave_before_the_next_run_begins(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    life = Life(recipe, tmp_path / "runs", ["train.devices=2", "train.deepspeed.stage=2", *waiting_loss.PLUGIN])
    running = life.start(WAITS_IN=str(tmp_path))
    waiting_loss.wait_for(tmp_path, running, ranks=2)
    running.kill()
    running.wait()
    orphans = set(life.processes())
    assert orphans
    waiting_loss.release(tmp_path)
    life.end()
    assert not orphans & set(life.processes())
    whole = tmp_path / "whole"
    Life(recipe, whole, life.overrides).end()
    assert not differences(life.folder, whole / "life", atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("train.devices", 1), ("torchrun", 1), ("torchrun", 0)])
def test_a_rank_that_is_killed_is_started_again(launcher: str, rank: int, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    zero = ["train.deepspeed.stage=2", *waiting_loss.PLUGIN]
    if launcher == "torchrun":
        life = Life(recipe, tmp_path / "runs", zero, [sys.executable, *TORCHRUN])
    else:
        life = Life(recipe, tmp_path / "runs", [*zero, "train.devices=2", "train.max_restarts=1"])
    running = life.start(WAITS_IN=str(tmp_path))
    waiting_loss.wait_for(tmp_path, running, ranks=2)
    ranks = list(life.processes(RANK=str(rank)))
    assert ranks
    for process in ranks:
        kill(process)
    waiting_loss.release(tmp_path)
    assert running.wait(timeout=300) == 0, life.said()
    said = life.said()
    assert "restart 1 of" in said
    assert "continuing from" in said
    assert not differences(life.folder, uninterrupted(recipe, tmp_path / "whole" / "life"), atol=1e-5)
