"""Runs that are killed at any moment: the same command again gives what an uninterrupted run gives, and leaves nothing else."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafttrain import pipeline
from drafttrain.config.load import load_recipe
from tests.kills import Life, files, rows, write_recipe

LAYOUTS = {"one process": [], "two processes, ZeRO-2": ["train.devices=2", "train.deepspeed.stage=2"]}
STAGES = ("gen", "cache", "step", "save", "export")
LIVES = int(os.environ.get("KILL_LIVES", "4"))
"""Of a layout in the whole matrix, each killed once in every stage."""
OF_EVALUATION = {"eval.json", "report.html", "drafter/README.md"}


def differences(folder: Path, whole: Path, *, exactly: bool) -> list[str]:
    """Return in what a run differs from an uninterrupted one."""
    found = []
    ours, theirs = (load_file(one / "drafter" / "model.safetensors") for one in (folder, whole))
    atol = 0.0 if exactly else 1e-6
    for name, weight in theirs.items():
        if not torch.allclose(ours[name], weight, rtol=0, atol=atol):
            found.append(f"{name}: {(ours[name] - weight).abs().max():.1e}")
    if exactly and rows(folder) != rows(whole):
        found.append("metrics.csv")
    losses = [[float(row["loss"] or "nan") for row in rows(one)] for one in (folder, whole)]
    if losses[0] != pytest.approx(losses[1], abs=atol, nan_ok=True):
        found.append(f"losses: {losses}")
    missing, left = files(whole) - files(folder), files(folder) - files(whole) - OF_EVALUATION
    if missing or left:
        found.append(f"files: {sorted(missing)} are missing, {sorted(left)} are left")
    return found


def killed_life(
    recipe: Path, layout: str, whole: Path, folder: Path, stages: Sequence[str], *, seed: int
) -> tuple[Counter[str], list[str]]:
    """Kill a run once in each stage, let it end; return how many kills struck, and what is different."""
    life = Life(recipe, folder, LAYOUTS[layout])
    draws, struck = random.Random(seed), Counter[str]()
    for stage in stages:
        struck[stage] += life.killed(stage, draws)
    life.end()
    return struck, differences(life.folder, whole, exactly=not life.overrides)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_folder)


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in this process, up to its drafter."""
    loaded, folder = load_recipe(recipe), tmp_path_factory.mktemp("whole") / "life"
    pipeline.gen(loaded, folder)
    run = pipeline.Run(loaded, folder)
    pipeline.train_drafter(run)
    pipeline.export_best(run)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_twice_ends_as_if_it_was_not(
    recipe: Path, layout: str, trained: Path, tmp_path: Path
) -> None:
    struck, different = killed_life(recipe, layout, trained, tmp_path / "killed", ("gen", "save"), seed=1)
    assert struck.total() == 2
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kill_matrix(recipe: Path, layout: str, tmp_path: Path) -> None:
    """The counts of one whole run are in benchmarks/kills.md."""
    whole = Life(recipe, tmp_path / "whole", LAYOUTS[layout])
    whole.end()
    tried, equal, found = Counter[str](), 0, list[str]()
    for number in range(LIVES):
        struck, different = killed_life(recipe, layout, whole.folder, tmp_path / str(number), STAGES, seed=number)
        tried += struck
        equal += 0 if different else struck.total()
        found += different
        counts = {"tried": tried.total(), "equal": equal, "lost": tried.total() - equal, "kills": dict(tried)}
        print(json.dumps({"layout": layout} | counts), different, flush=True)
    assert not found
    assert counts["lost"] == 0
    assert counts["tried"] >= 0.8 * LIVES * len(STAGES)
