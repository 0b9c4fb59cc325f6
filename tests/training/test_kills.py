"""Runs that are killed at any moment: the same command again gives what an uninterrupted run gives, and leaves nothing else."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.training.kills import Life, differences, uninterrupted, write_recipe

LAYOUTS = {"one process": [], "two processes, ZeRO-2": ["train.devices=2", "train.deepspeed.stage=2"]}
STAGES = ("gen", "cache", "step", "save", "export")
LIVES = int(os.environ.get("KILL_LIVES", "4"))
"""Of a layout in the whole matrix, each killed once in every stage."""


def killed_life(
    recipe: Path, layout: str, whole: Path, folder: Path, stages: Sequence[str], *, seed: int, atol: float = 1e-6
) -> tuple[Counter[str], list[str]]:
    """Kill a run once in each stage, let it end; return how many kills struck, and what is different.

    Args:
        atol: Of several processes; one is bit-equal.
    """
    life = Life(recipe, folder, LAYOUTS[layout])
    draws, struck = random.Random(seed), Counter[str]()
    for stage in stages:
        struck[stage] += life.killed(stage, draws)
    life.end()
    return struck, differences(life.folder, whole, atol=atol if life.overrides else 0.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_folder)


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in this process, up to its drafter."""
    return uninterrupted(recipe, tmp_path_factory.mktemp("whole") / "life")


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_twice_ends_as_if_it_was_not(
    recipe: Path, layout: str, trained: Path, tmp_path: Path
) -> None:
    # Two processes are held against one, whose sums run in another order.
    struck, different = killed_life(recipe, layout, trained, tmp_path / "killed", ("gen", "save"), seed=1, atol=1e-5)
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
