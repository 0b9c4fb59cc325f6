"""Number types that a recipe leaves to the machine (`auto`), decided once a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.target_model.device import kind_of_device
from drafttrain.target_model.number_type import number_type, trains_in_bfloat16


def resolve_auto_types(recipe: Recipe, held: Recipe | None) -> Recipe:
    """Return a recipe with `target.dtype`, `train.precision` and `train.tf32` decided.

    A run that continues keeps the types that it started with, even on another kind of device.

    Args:
        held: The recipe of the run in the folder, if there is one.
    """
    device_type = kind_of_device(recipe.target.device if recipe.train.device == "auto" else recipe.train.device)
    dtype = _target_type(recipe, held)
    here = {"target.dtype": dtype, "train.precision": _precision(recipe, held, dtype=dtype, device_type=device_type)}
    began = {} if held is None else {"target.dtype": held.target.dtype, "train.precision": held.train.precision}
    chosen: dict[str, Any] = here | {key: began[key] for key in began if _left_open(recipe, key)}
    if (tf32 := recipe.train.tf32) is None:
        tf32 = True if held is None else held.train.tf32
    differs = [f"{key}: {chosen[key]} (auto would be {here[key]} here)" for key in here if chosen[key] != here[key]]
    if device_type == "cuda" and recipe.train.tf32 is None and tf32 is False:
        differs.append("train.tf32: false")
    if differs:
        say(f"{recipe.name}: continues as it started: {', '.join(differs)}")
    elif held is None and device_type == "cuda":
        say(f"{recipe.name}: {', '.join(f'{key}: {value}' for key, value in chosen.items())}")
    return replace(
        recipe,
        target=replace(recipe.target, dtype=chosen["target.dtype"]),
        train=replace(recipe.train, precision=chosen["train.precision"], tf32=tf32),
    )


def _target_type(recipe: Recipe, held: Recipe | None) -> str:
    """Return the type for this machine; a CPU does not measure again what the run has stored."""
    if held is not None and _left_open(recipe, "target.dtype") and kind_of_device(recipe.target.device) == "cpu":
        return held.target.dtype
    return number_type(recipe.target)


def _precision(recipe: Recipe, held: Recipe | None, *, dtype: str, device_type: str) -> str:
    """Return the precision of the training; a CPU measures only for a drafter whose target is in bfloat16, and only once a run."""
    by_device = recipe.train.on(device_type, head=recipe.head is not None).precision
    if (
        device_type != "cpu"
        or dtype != "bfloat16"
        or recipe.head is not None
        or not _left_open(recipe, "train.precision")
    ):
        return by_device
    if held is not None:
        return held.train.precision
    return "bf16-mixed" if trains_in_bfloat16(recipe.target) else by_device


def _left_open(recipe: Recipe, key: str) -> bool:
    return {"target.dtype": recipe.target.dtype, "train.precision": recipe.train.precision}[key] == "auto"
