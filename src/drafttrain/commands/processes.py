"""The processes of one command: they are joined and checked before anything is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from drafttrain.config.dump import dump_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.errors import DrafttrainError, RecipeError
from drafttrain.core.files import clear_leftovers
from drafttrain.distributed.collectives import first_before_others, together
from drafttrain.distributed.world import is_first, launched, world
from drafttrain.pipeline.folder import RunFolder
from drafttrain.target_model.device import pick_device
from drafttrain.training.preflight import check_processes


@contextlib.contextmanager
def joined_processes(recipe: Recipe, folder: Path, held: contextlib.ExitStack) -> Iterator[None]:
    """Join the processes that a launcher started, and check that they can work together.

    Args:
        held: The first process holds the lock of the run folder until this closes.
    """
    settings = recipe.train
    if settings.target_placement == "sharded" and not launched():
        problem = "one process cannot shard a target: start several (docs/multi-node.md)"
        raise RecipeError(recipe.name, [f"train.target_placement: sharded: {problem}"])
    if problems := list(device_problems(recipe)):
        raise RecipeError(recipe.name, problems)
    with together(timeout_seconds=settings.timeout_seconds):
        if launched():
            check_processes(recipe.name, dump_recipe(recipe), folder, settings)
        with first_before_others("it locks the run folder and removes leftovers of a killed run"):
            if is_first():
                held.enter_context(RunFolder(folder).locked())
                clear_leftovers(folder)
        yield


def device_problems(recipe: Recipe) -> Iterator[str]:
    """Yield the devices of the recipe that this machine lacks, or that its processes cannot train on."""
    places = {"train.device": recipe.train.device, "target.device": recipe.target.device}
    for key, device in places.items():
        try:
            pick_device(device)
        except DrafttrainError as error:
            yield f"{key}: {error}"
    if launched():
        numbered = {key: device for key, device in places.items() if device.startswith("cuda:")}
        several = f"and there are {world().size} processes: leave it at auto"
        yield from (f"{key}: {device} is one device, {several}" for key, device in numbered.items())
    key = "target.device" if recipe.train.device == "auto" else "train.device"
    if places[key] == "cpu" and torch.cuda.is_available() and (launched() or recipe.train.deepspeed is not None):
        yield f"{key}: cpu: DeepSpeed trains on CUDA if it sees a device. Hide all devices with CUDA_VISIBLE_DEVICES="
