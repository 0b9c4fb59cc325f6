"""Several real GPUs: NCCL, ZeRO 0-3, and each process on a GPU of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drafttrain.distributed.world import without_launcher
from tests.gpu.conftest import ON
from tests.gpu.runs import FP32, fitted, losses, recipe_on

pytestmark = pytest.mark.multi_gpu

MODULE = ("-m", "tests.gpu.own_device")


@pytest.mark.parametrize("name", ["causal_lm", "eagle3_cut", "medusa"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_gpus_have_the_losses_of_one(
    stage: int, name: str, devices: str, target_folder: Path, tmp_path: Path
) -> None:
    """Under every stage of ZeRO, through the launcher that a user has."""
    made = recipe_on("auto", name, target=target_folder, folder=tmp_path, **FP32 | {"checkpoint_every_steps": 100})
    one = losses(fitted(made, tmp_path / "one", "train.devices=1"))
    two = losses(fitted(made, tmp_path / "two", "train.devices=2", f"train.deepspeed={{stage: {stage}}}"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_gpus_continue_what_one_began(stage: int, devices: str, target_folder: Path, tmp_path: Path) -> None:
    """With AdamW, whose states are spread out: the checkpoint of one layout fits every other."""
    settings = FP32 | {"optimizer": "adamw", "lr": 1e-3, "checkpoint_every_steps": 2}
    made = recipe_on("auto", "causal_lm", target=target_folder, folder=tmp_path, **settings)
    whole = losses(fitted(made, tmp_path / "one", "train.devices=1"))
    began = tmp_path / "two"
    fitted(made, began, "train.devices=1")
    run = began / made.name
    for name in ("train.json", "last", "drafter", "eval.json", "report.html"):
        subprocess.run(["rm", "-rf", str(run / name)], check=True)
    newest = sorted((run / "checkpoints").glob("step-*.ckpt"))[-1]
    newest.unlink()
    two = losses(fitted(made, began, "train.devices=2", f"train.deepspeed={{stage: {stage}}}"))
    assert two == pytest.approx(whole, rel=1e-3)


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_process_of_torchrun_has_a_gpu_of_its_own(devices: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, *MODULE, str(tmp_path)], env=without_launcher(os.environ), check=True)
    found = reports(tmp_path)
    assert [one["sum"] for one in found] == [2.0, 2.0]
    if ON == "cuda":
        assert found[0]["device"] != found[1]["device"]


def test_processes_that_see_one_gpu_each_have_it(devices: str, tmp_path: Path) -> None:
    """As `srun --gpus-per-task=1` and Kubernetes show them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, *MODULE, str(tmp_path)],
            env=without_launcher(os.environ)
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    found = reports(tmp_path)
    assert [one["sum"] for one in found] == [2.0, 2.0]
    if ON == "cuda":
        assert [one["visible"] for one in found] == [1, 1]
        assert found[0]["device"] != found[1]["device"]
