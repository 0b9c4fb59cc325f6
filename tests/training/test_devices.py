"""Which device a process takes, and where its models go: machines with several devices, simulated."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.fabric.strategies.deepspeed import _validate_device_index_selection

from drafttrain.commands.processes import device_problems
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DrafttrainError, RecipeError
from drafttrain.distributed import collectives
from drafttrain.distributed.world import for_own_program, without_launcher, world
from drafttrain.heads.acceptance import AcceptanceHead, AcceptanceSettings
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import probabilities
from drafttrain.target_model.device import pick_device
from drafttrain.training.run import placement
from drafttrain.training.settings import TrainSettings


def rank_of_four(monkeypatch: pytest.MonkeyPatch, rank: int, *, launcher: str) -> None:
    """Stand where a launcher put one of four processes of one machine."""
    # Whoever joins writes there too.
    monkeypatch.setattr(os, "environ", without_launcher(os.environ))
    named = {
        "torchrun": {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 4},
        "deepspeed": {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_SIZE": 4, "CROSS_SIZE": 1},
        "srun": {"SLURM_PROCID": rank, "SLURM_NTASKS": 4, "SLURM_LOCALID": rank, "SLURM_STEP_TASKS_PER_NODE": 4},
    }
    for name, value in ({"MASTER_ADDR": "a", "MASTER_PORT": 1} | named[launcher]).items():
        monkeypatch.setenv(name, str(value))


def machine_of(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Let torch see so many CUDA devices; return the list of those that are made the current one."""
    taken: list[int] = []

    def take(number: int) -> None:
        if number >= count:
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be ...")
        taken.append(number)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    return taken


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
@pytest.mark.parametrize(("visible", "own"), [(1, 0), (2, 1), (4, 3), (8, 3)])
def test_a_process_takes_its_device_of_those_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, launcher: str, visible: int, own: int
) -> None:
    """Of all of the machine, or of its own alone (`srun --gpus-per-task=1`); for Lightning and DeepSpeed too."""
    rank_of_four(monkeypatch, 3, launcher=launcher)
    taken = machine_of(monkeypatch, visible)
    here = collectives._on_own_device(world())
    assert (taken, here.local_rank, os.environ["LOCAL_RANK"]) == ([own], own, str(own))
    assert (world().rank, world().size, world().local_rank) == (3, 4, own)
    placed = placement(torch.device("cuda"), TrainSettings())
    strategy = placed["strategy"]
    strategy.parallel_devices = [torch.device("cuda", number) for number in placed["devices"]]
    _validate_device_index_selection(strategy.parallel_devices)
    assert strategy.root_device == torch.device("cuda", own)
    assert placed["num_nodes"] == 1


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_several_processes_of_one_machine_train_on_its_cpus(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    rank_of_four(monkeypatch, 3, launcher=launcher)
    here = world()
    assert (here.local_rank, here.local_size) == (3, 4)
    placed = placement(torch.device("cpu"), TrainSettings())
    placed["strategy"].parallel_devices = [torch.device("cpu")] * placed["devices"]
    assert placed["strategy"].root_device == torch.device("cpu", 0)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"), [("4(x2)", 0, 4), ("4(x2),2", 2, 2), ("3", 1, 3), ("2,1(x3)", 3, 1), ("8(x2)", 1, 8)]
)
def test_slurm_sets_how_many_processes_each_machine_has(
    monkeypatch: pytest.MonkeyPatch, tasks: str, node: int, expected: int
) -> None:
    rank_of_four(monkeypatch, 0, launcher="srun")
    for name, value in {"SLURM_NTASKS": 16, "SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": tasks}.items():
        monkeypatch.setenv(name, str(value))
    assert world().local_size == expected


@pytest.mark.parametrize(("shown", "expected"), [("5", "5"), ("", "0"), ("4,5,6,7", "7")])
def test_a_program_that_a_process_starts_gets_the_device_of_the_process(
    monkeypatch: pytest.MonkeyPatch, shown: str, expected: str
) -> None:
    rank_of_four(monkeypatch, 3, launcher="torchrun")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    machine_of(monkeypatch, max(1, len(shown.split(","))))
    collectives._on_own_device(world())
    assert for_own_program(os.environ)["CUDA_VISIBLE_DEVICES"] == expected


def test_a_device_that_cuda_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_of_four(monkeypatch, 3, launcher="torchrun")
    machine_of(monkeypatch, 4)

    def refuse(number: int) -> None:
        raise RuntimeError("CUDA error: device is busy\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with (
        pytest.raises(
            DrafttrainError, match=r"rank 3 on \S+: CUDA device 3 of the 4 visible ones cannot be used: .* busy$"
        ),
        collectives.together(timeout_seconds=1),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cuda:1", 2, "cuda:1"), ("cpu", 2, "cpu")],
)
def test_a_device_is_taken_by_name(monkeypatch: pytest.MonkeyPatch, name: str, count: int, expected: str) -> None:
    machine_of(monkeypatch, count)
    assert str(pick_device(name)) == expected


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("cuda", 0, "no such CUDA device. Available: none"),
        ("cuda:2", 2, "Available: cuda:0, cuda:1"),
        ("gpu", 2, "device 'gpu': must be cpu, cuda, cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, expected: str
) -> None:
    machine_of(monkeypatch, count)
    with pytest.raises(DrafttrainError, match=expected):
        pick_device(name)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.deepspeed={}", "target.device=cuda:1"], "target.device: cuda:1: DeepSpeed .* CUDA_VISIBLE_DEVICES=1"),
        (["train.deepspeed={}", "train.device=cuda:3"], "train.device: cuda:3: DeepSpeed .* CUDA_VISIBLE_DEVICES=3"),
        (["train.deepspeed={}", "train.device=cuda:0", "target.device=cuda:1"], None),
        (["train.deepspeed={}", "target.device=cuda:0"], None),
        (["train.deepspeed={}"], None),
        (["target.device=cuda:1"], None),
        (["train.devices=2", "target.device=cuda:1"], "target.device: cuda:1 is one device, for 2 processes"),
        (["train.devices=2", "target.device=cpu"], None),
    ],
)
def test_a_numbered_device_is_refused_where_it_cannot_be_taken(overrides: list[str], expected: str | None) -> None:
    if expected is None:
        load_recipe("tiny_eagle3", overrides)
        return
    with pytest.raises(RecipeError, match=expected):
        load_recipe("tiny_eagle3", overrides)


@pytest.mark.parametrize(
    ("overrides", "count", "expected"),
    [
        (["target.device=cuda:1"], 4, ["target.device: cuda:1 is one device, and there are 4 processes"]),
        (["train.device=cuda:1"], 4, ["train.device: cuda:1 is one device, and there are 4 processes"]),
        (["target.device=cpu"], 4, ["target.device: cpu: DeepSpeed trains on CUDA if it sees a device"]),
        (["target.device=cpu"], 0, []),
        (["target.device=cuda"], 4, []),
        ([], 4, []),
    ],
)
def test_several_processes_refuse_a_device_that_they_cannot_share(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], count: int, expected: list[str]
) -> None:
    rank_of_four(monkeypatch, 0, launcher="torchrun")
    machine_of(monkeypatch, count)
    said = list(device_problems(load_recipe("tiny_eagle3", overrides)))
    assert len(said) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(said, expected, strict=True))


def test_a_head_is_measured_where_it_is() -> None:
    """Here on `meta`, which has no values: rows went there, and chances come back."""
    head = AcceptanceHead(AcceptanceSettings(num_blocks=1), 8).to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        probabilities(head, HeadRows(torch.ones(4, 8), torch.ones(4)))


@pytest.mark.parametrize("key", ["target.device", "train.device"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    machine_of(monkeypatch, 0)
    recipe = load_recipe("tiny_eagle3", [f"{key}=cuda"])
    assert list(device_problems(recipe)) == [
        f"{key}: device cuda: no such CUDA device. Available: none. Choose one of them, cpu or auto"
    ]
