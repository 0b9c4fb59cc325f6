"""Starts a training in several processes on this machine, one per device, through torchrun's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.errors import GateError, Interrupted, RecipeError
from drafttrain.distributed.world import launched

STOP_SECONDS = 300
"""How long processes may take to stop."""
REFUSALS = (RecipeError.exit_code, GateError.exit_code)
"""Exit codes that a restart would not change."""


def processes_wanted(settings: Any) -> int:
    """Return how many processes a training needs, if no launcher started it.

    A head is small and online learning is one process: both get several only if `train.devices` asks for them.

    Args:
        settings: The recipe: its `train`, `head` and `online` and, for the device of the target, `target`.

    Raises:
        RecipeError: `train.devices` asks for more CUDA devices than there are.
    """
    if launched():
        return 1
    import torch

    asked, found = settings.train.devices, torch.cuda.device_count()
    one_device = settings.target.device not in ("auto", "cuda") or settings.train.device != "auto"
    if asked is None:
        alone = one_device or settings.head is not None or settings.online is not None
        return 1 if alone else max(1, found)
    if found and not one_device and asked > found:
        raise RecipeError("train.devices", [f"{asked} devices requested, this machine has {found}"])
    return int(asked)


def relaunch(count: int, *, max_restarts: int) -> int:
    """Run this command again in `count` processes; return the exit code of the first one that failed, or 0.

    Args:
        max_restarts: How often all processes are restarted after one died; they resume from the last checkpoint.
            A refusal or an intended stop is not retried.

    Raises:
        Interrupted: This process was asked to stop; all finished their step and saved a checkpoint.
    """
    say(f"starting {count} processes on this machine (train.devices)")
    code = _in_processes(count)
    for restart in range(1, max_restarts + 1):
        if code in (0, Interrupted.exit_code, *REFUSALS):
            break
        say(f"a process died: restart {restart} of {max_restarts}")
        code = _in_processes(count)
    return code


def _in_processes(count: int) -> int:
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Processes that are asked to stop finish a step and save a checkpoint. The default of 30 s would kill them before.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"is_host": True},
        run_id="drafttrain",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "drafttrain", *sys.argv[1:])
    except ChildFailedError as error:
        return _code(error.failures.values())
    except SignalException as error:
        raise Interrupted(
            f"stopped by {error.sigval.name}, and all processes with it: run the same command to continue"
        ) from error
    return 0


def _code(failures: Iterable[Any]) -> int:
    """Return the exit code of failed processes: a refusal's, 1 if a process died, else that of the first to fail."""
    codes = [int(failure.exitcode) for failure in sorted(failures, key=lambda failure: failure.timestamp)]
    if refused := [code for code in codes if code in REFUSALS]:
        return refused[0]
    # After one was killed the others are asked to stop and exit as interrupted, which nobody asked for.
    return 1 if min(codes, default=0) <= 0 else codes[0]
