"""Training while another process writes the cache: the same drafter, bit for bit, and a writer that fails is named."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.pipeline.cache_process import CacheProcess
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.training.result import folder_of_step
from tests.marks import slow
from tests.pipeline.test_engine_states import STEPS, written_recipe

MEANWHILE = "data.cache_while_training=true"
PLACED = ["train.target_placement=replicated", "train.num_threads=1"]
LIMIT_SECONDS = 300.0


@pytest.fixture
def recipe(tmp_path: Path, save_llama: Any) -> Path:
    return written_recipe(tmp_path, save_llama(num_layers=4))


def trained(recipe: Path, folder: Path, *overrides: str) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    """Train; return the losses of metrics.csv and the last weights."""
    run = DrafterRun(load_recipe(recipe, [*PLACED, *overrides]), folder)
    run.train()
    with (folder / "metrics.csv").open() as file:
        losses = [
            {name: row[name] for name in ("step", "loss", "alpha") if name in row} for row in csv.DictReader(file)
        ]
    return losses, load_file(folder_of_step(folder, STEPS) / "model.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("vocabulary", [slow("null"), "40"])
def test_the_drafter_is_that_of_the_finished_cache(recipe: Path, tmp_path: Path, vocabulary: str) -> None:
    override = f"drafter.draft_vocab_size={vocabulary}"
    wanted, weights = trained(recipe, tmp_path / "whole", override)
    found, ours = trained(recipe, tmp_path / "meanwhile", override, MEANWHILE)
    assert found == wanted
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights.items())
    files = [path.name for path in (tmp_path / "whole" / "data").rglob("*.npy")]
    assert sorted(path.name for path in (tmp_path / "meanwhile" / "data").rglob("*.npy")) == sorted(files)
    provenance = json.loads((tmp_path / "meanwhile" / "provenance.json").read_text())
    assert len(provenance) == 1, "the writer is a part of this run"
    # Nothing is missing now, so no other process is started.
    run = DrafterRun(load_recipe(recipe, [*PLACED, override, MEANWHILE]), tmp_path / "meanwhile")
    run.prepare()
    assert run._arriving.missing == 0


def test_the_writer_leaves_the_files_of_the_run_as_they_are(recipe: Path, tmp_path: Path) -> None:
    folder, loaded = tmp_path / "run", load_recipe(recipe, [*PLACED, MEANWHILE])
    DrafterRun(loaded, folder)

    def held() -> dict[str, tuple[bytes, int]]:
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}

    before = held()
    assert {"recipe.yaml", "provenance.json", "inputs.json"} <= before.keys()
    DrafterRun(loaded, folder, opening="join")
    assert held() == before
    # The control: a run that continues is noted.
    DrafterRun(loaded, folder)
    assert held() != before


@pytest.mark.processes
def test_a_writer_that_fails_is_named_and_one_that_works_ends_when_it_is_closed(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    DrafterRun(load_recipe(recipe, [*PLACED, MEANWHILE]), folder)
    stored = folder / "recipe.yaml"
    stored.write_text(stored.read_text().replace("text.txt", "gone.txt"))
    writer, limit = CacheProcess(folder), time.monotonic() + LIMIT_SECONDS
    assert writer.ended() is None
    writer.start()
    while (why := writer.ended()) is None and time.monotonic() < limit:
        time.sleep(0.1)
    assert why is not None
    assert why.startswith("the process that writes them failed: ")
    assert "gone.txt" in why
    assert writer.ended() == why
    writer.close()
    stored.write_text(stored.read_text().replace("gone.txt", "text.txt"))
    working = CacheProcess(folder)
    working.start()
    process = working._process
    assert process is not None
    working.close()
    assert process.returncode is not None
    assert working.ended() is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.cache=none"], "data.cache_while_training: nothing is cached"),
        (["train.target_placement=sharded"], "data.cache_while_training: a sharded target computes in the processes"),
        (["train.devices=2"], "data.cache_while_training: 2 processes would wait for one writer"),
    ],
)
def test_recipes_that_cannot_do_it_are_refused(recipe: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as found:
        load_recipe(recipe, [MEANWHILE, "train.target_placement=replicated", *overrides])
    assert expected in str(found.value)
