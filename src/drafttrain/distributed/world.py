"""Which process this is, of how many, from the environment that the launcher set."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from drafttrain.core.errors import RecipeError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LAUNCHED = (*TORCHRUN, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK")
"""What a process started from here must not inherit."""


@dataclass(frozen=True)
class World:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its own machine; once it has joined, the number of its device among those that it sees."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def name(self) -> str:
        """What errors call this process."""
        return f"rank {self.rank} on {socket.gethostname()}"


def world() -> World:
    """Return which process this is, as the launcher says.

    Raises:
        RecipeError: The environment names some of what is needed and not the rest.
    """
    env = environment()
    if not env:
        return World()
    size, local_rank = int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    return World(int(env["RANK"]), size, local_rank, min(size, max(_local_size(env), local_rank + 1)))


def _local_size(env: Mapping[str, str]) -> int:
    """Return how many processes the launcher started on this machine: torchrun, DeepSpeed and Slurm each name it differently."""
    if named := env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE"):
        return int(named)
    of_nodes = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or "1"
    tasks: list[int] = []
    for part in of_nodes.split(","):  # 4(x2),1: four on each of two nodes, one on the third
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks[min(int(env.get("SLURM_NODEID", "0")), len(tasks) - 1)]


def is_first() -> bool:
    """Tell whether this is the process that speaks and writes."""
    return world().rank == 0


def launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    return world().size > 1


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that is on its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHED and not name.startswith(("TORCHELASTIC_", "SLURM_"))
    }


def for_own_program(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for another program that one of several processes starts: on its own, on the device of this process."""
    own = without_launcher(environment)
    if launched():
        devices = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = world().local_rank
        # A launcher that shows each process its own device only has named it already.
        own["CUDA_VISIBLE_DEVICES"] = devices[number] if number < len(devices) else ",".join(devices) or str(number)
    return own


def environment() -> dict[str, str]:
    env = dict(os.environ)
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env |= {name: env[slurm] for name, slurm in SLURM.items()}
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))))
        env.setdefault("MASTER_PORT", str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 15000))
    if "RANK" not in env or env.get("WORLD_SIZE", "1") == "1":
        return {}
    missing = [name for name in TORCHRUN if name not in env]
    if missing:
        raise RecipeError(
            "environment",
            [
                f"RANK is set but {', '.join(missing)} is not: start with torchrun, deepspeed or srun (docs/multi-node.md)"
            ],
        )
    return env


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's list: `node[03-05,09],login1` begins with node03."""
    if not nodes:
        return "127.0.0.1"
    head, bracket, rest = nodes.partition("[")
    return head + rest.replace(",", "-").replace("]", "-").split("-")[0] if bracket else head.split(",")[0]


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
