"""The processes of one command: joined, and checked to be able to work together, before anything is loaded."""

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
def all_processes(recipe: Recipe, folder: Path, held: contextlib.ExitStack) -> Iterator[None]:
    """Join the processes that a launcher started, and look that they can work together, before anything is loaded.

    Args:
        held: Until it closes, the first process holds the run folder.
    """
    settings = recipe.train
    if settings.target_placement == "sharded" and not launched():
        problem = "there is one process, and nothing to spread a target over: start several (docs/multi-node.md)"
        raise RecipeError(recipe.name, [f"train.target_placement: sharded: {problem}"])
    if problems := list(device_problems(recipe)):
        raise RecipeError(recipe.name, problems)
    with together(timeout_seconds=settings.timeout_seconds):
        if launched():
            check_processes(recipe.name, dump_recipe(recipe), folder, settings)
        with first_before_others("it takes the run folder and clears what a killed run left"):
            if is_first():
                held.enter_context(RunFolder(folder).taken())
                clear_leftovers(folder)
        yield


def device_problems(recipe: Recipe) -> Iterator[str]:
    """Tell which devices of the recipe are not here, or cannot be trained on by the processes that are there."""
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
        yield f"{key}: cpu: DeepSpeed trains on CUDA wherever it sees a device: hide them all with CUDA_VISIBLE_DEVICES="
