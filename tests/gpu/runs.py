"""Recipes of every kind that train on the same texts, on a device that is named; and what their runs wrote."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.config.dump import dump_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.distributed.world import without_launcher
from drafttrain.pipeline.data import write_texts as write_data
from drafttrain.pipeline.drafter_run import DrafterRun
from tests.cuda.kinds import KINDS, Kind, recipe, write_texts

FP32 = {"precision": "fp32", "tf32": False, "optimizer": "sgd", "lr": 0.1, "max_steps": 4, "eval_every_steps": 0}
"""Steps whose numbers two devices must agree on: plain gradient descent, whose steps are as close as its gradients."""


def recipe_on(device: str, name: str, *, target: Path, folder: Path, dtype: str = "float32", **train: Any) -> Recipe:
    """Return a kind's recipe; all kinds train on the plain texts of a folder, which no device's draws decide."""
    write_texts(folder)
    kind = Kind(KINDS[name].drafter, KINDS[name].loss)
    made = recipe(kind, target=target, folder=folder, train=train)
    return replace(made, target=replace(made.target, device=device, dtype=dtype))


def trained(made: Recipe, folder: Path) -> list[dict[str, str]]:
    """Train, and return the rows of metrics.csv."""
    run = DrafterRun(made, folder)
    write_data(run)
    run.train()
    return rows(folder)


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv that have a loss."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def losses(table: list[dict[str, str]]) -> list[float]:
    """Return the loss of every row."""
    return [float(row["loss"]) for row in table]


def fitted(made: Recipe, folder: Path, *overrides: str) -> list[dict[str, str]]:
    """Fit a recipe as a user does, in as many processes as it asks for; return the rows of metrics.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(made), encoding="utf-8")
    command = [sys.executable, "-m", "drafttrain", "fit", str(path), "--runs", str(folder), *overrides]
    done = subprocess.run(command, env=without_launcher(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return rows(folder / made.name)
