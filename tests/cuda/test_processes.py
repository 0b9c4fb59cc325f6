"""Two processes with a GPU each, over a group that serves the GPUs alone: a whole training, stopped and resumed, under every stage."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from drafttrain.distributed.world import without_launcher
from drafttrain.pipeline.drafter_run import DrafterRun
from tests.cuda.kinds import IN_PROCESSES, KINDS, recipe, write_texts

pytestmark = pytest.mark.pretended_cuda

LAYOUTS = {2: [0, 2, 3], 1: [0]}
"""ZeRO stages by how many GPUs a process sees: all, or its own alone, as `srun --gpus-per-task=1` and Kubernetes show them."""
COLUMNS = ("loss", "acceptance_rate", "grad_norm", "tokens")


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def in_two_processes(folder: Path, *, num_gpus: int, stages: list[int]) -> None:
    """Train in two processes that see so many GPUs each, under these ZeRO stages; both must come to their end."""
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = without_launcher(os.environ) | launcher | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda"}
    command = [sys.executable, "-m", "tests.cuda.two_processes", str(folder), str(num_gpus), *map(str, stages)]
    running = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    told = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(one[-4000:] for one in told)


def rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv, but that of the start."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, target_folder: Path) -> Path:
    """A folder with the texts and the target, and what one process trained on one GPU."""
    folder = tmp_path_factory.mktemp("two")
    write_texts(folder)
    shutil.copytree(target_folder, folder / "target")
    DrafterRun(recipe(KINDS[IN_PROCESSES], target=target_folder, folder=folder), folder / "alone").train()
    return folder


@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_two_processes_stop_resume_and_train_what_one_does(alone: Path, num_gpus: int) -> None:
    in_two_processes(alone, num_gpus=num_gpus, stages=LAYOUTS[num_gpus])
    expected = rows(alone / "alone")
    for stage in LAYOUTS[num_gpus]:
        folder = alone / f"gpus-{num_gpus}-stage-{stage}"
        found = rows(folder)
        assert len(found) == len(expected) == 3
        for own, other in zip(found, expected, strict=True):
            assert own == pytest.approx(other, rel=5e-3), f"stage {stage}"
        assert (folder / "train.json").exists()
