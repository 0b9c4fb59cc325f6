"""One of several processes with a pretended GPU each: `python -m tests.cuda.two_processes FOLDER GPUS STAGE...`, started as srun does.

FOLDER holds the texts and the target; each process sees so many GPUs. Under every ZeRO stage it trains until the second process
is asked to stop, then from the checkpoint to the end.
"""

from tests.cuda import preload

preload.load()

import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from drafttrain.config.recipe import Recipe  # noqa: E402
from drafttrain.core.errors import Interrupted  # noqa: E402
from drafttrain.distributed.collectives import together, wait_for_all  # noqa: E402
from drafttrain.distributed.world import is_first  # noqa: E402
from drafttrain.pipeline.drafter_run import DrafterRun  # noqa: E402
from tests.cuda.groups import groups_of_devices  # noqa: E402
from tests.cuda.happenings import happenings  # noqa: E402
from tests.cuda.kinds import IN_PROCESSES, KINDS, recipe  # noqa: E402
from tests.cuda.runtime import gpus  # noqa: E402


def train_twice(made: Recipe, folder: Path) -> None:
    """Train until the second process is asked to stop, then to the end."""
    run = DrafterRun(made, folder)
    if not is_first():
        ask_to_stop(run)
    try:
        run.train()
    except Interrupted:
        wait_for_all("they begin again")
    else:
        raise AssertionError("a process was asked to stop")
    DrafterRun(made, folder).train()


def ask_to_stop(run: DrafterRun) -> None:
    """Ask this process to stop in its first step."""

    def ask(module: torch.nn.Module, _: object) -> None:
        if module.training:
            hook.remove()
            os.kill(os.getpid(), signal.SIGTERM)

    hook = run.drafter.register_forward_pre_hook(ask)


def refuses_the_cpu() -> bool:
    """Return whether a planted tensor of the CPU is refused and recorded; the record is cleared."""
    refused = ""
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        refused = str(error)
    recorded = sum(happenings.refusals.values())
    happenings.refusals.clear()
    return recorded == 1 and "No backend type associated with device type cpu" in refused


def main(folder: Path, num_gpus: int, stages: list[int]) -> None:
    """Train under every stage."""
    with gpus(num_gpus), groups_of_devices(), together(timeout_seconds=60):
        assert refuses_the_cpu()
        for stage in stages:
            train = {"deepspeed": {"stage": stage}} if stage else {}
            made = recipe(KINDS[IN_PROCESSES], target=folder / "target", folder=folder, device="auto", train=train)
            train_twice(made, folder / f"gpus-{num_gpus}-stage-{stage}")
        happenings.require_no_refusal()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(stage) for stage in sys.argv[3:]])
