"""Which process this is, and of how many, from the launcher's environment variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from drafttrain.core.errors import RecipeError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
LAUNCHED = (*TORCHRUN, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK")
"""Variables that a subprocess must not inherit."""


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its own machine. After it has joined: the number of its device among those it can see."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def name(self) -> str:
        """The name of this process in errors."""
        return f"rank {self.rank} on {socket.gethostname()}"


def world() -> World:
    """Return which process this is, according to the launcher.

    Raises:
        RecipeError: Some of the variables are set and others are missing.
    """
    env = launcher_environment()
    if not env:
        return World()
    size, local_rank = int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    return World(int(env["RANK"]), size, local_rank, min(size, max(_local_size(env), local_rank + 1)))


def is_first() -> bool:
    """Return whether this is rank 0, the process that logs and writes."""
    return world().rank == 0


def launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return world().size > 1


def launcher_environment() -> dict[str, str]:
    """Return the environment with torchrun's variables, translated from Slurm's if needed; empty for a single process.

    Raises:
        RecipeError: Some of the variables are set and others are missing.
    """
    env = dict(os.environ)
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env |= {name: env[slurm] for name, slurm in SLURM.items()}
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))))
        env.setdefault("MASTER_PORT", str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 15000))
    if "RANK" not in env or env.get("WORLD_SIZE", "1") == "1":
        return {}
    if missing := [name for name in TORCHRUN if name not in env]:
        start = "start with torchrun, deepspeed or srun (docs/multi-node.md)"
        raise RecipeError("environment", [f"RANK is set but {', '.join(missing)} is not: {start}"])
    return env


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a subprocess that runs alone."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHED and not name.startswith(("TORCHELASTIC_", "SLURM_"))
    }


def for_own_program(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for another program that this process starts: it runs alone, on this process's device."""
    own = without_launcher(environment)
    if launched():
        devices = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        number = world().local_rank
        # A launcher that shows each process only its own device has set the variable already.
        own["CUDA_VISIBLE_DEVICES"] = devices[number] if number < len(devices) else ",".join(devices) or str(number)
    return own


def _local_size(env: Mapping[str, str]) -> int:
    """Return how many processes run on this machine: torchrun, DeepSpeed and Slurm name it differently."""
    if named := env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE"):
        return int(named)
    by_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or "1"
    tasks: list[int] = []
    for part in by_node.split(","):  # 4(x2),1: four on each of two nodes, one on the third
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks[min(int(env.get("SLURM_NODEID", "0")), len(tasks) - 1)]


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's list: `node[03-05,09],login1` begins with node03."""
    if not nodes:
        return "127.0.0.1"
    head, bracket, rest = nodes.partition("[")
    return head + rest.replace(",", "-").replace("]", "-").split("-")[0] if bracket else head.split(",")[0]
