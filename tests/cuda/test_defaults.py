"""What a recipe that names neither types nor devices does on a GPU: a drafter in bf16-mixed, a head where its target is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.config.load import read_recipe
from drafttrain.pipeline.data import write_texts as write_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.head_run import HeadRun
from drafttrain.training.head import HeadModule
from tests.cuda.happenings import Happenings
from tests.cuda.kinds import KINDS, recipe, write_texts

pytestmark = pytest.mark.pretended_cuda


@pytest.mark.parametrize("name", ["kangaroo", "eagle"])
def test_a_drafter_trains_in_bf16_mixed_on_a_float32_target(
    name: str, tmp_path: Path, target_folder: Path, cuda: Happenings, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both say what they say by the target's own head."""
    write_texts(tmp_path)
    made = recipe(KINDS[name], target=target_folder, folder=tmp_path)
    target = replace(made.target, dtype="auto", device="auto")
    run = DrafterRun(replace(made, target=target, train=replace(made.train, precision="auto")), tmp_path / "run")
    assert (run.recipe.target.dtype, run.recipe.train.precision) == ("float32", "bf16-mixed")
    write_data(run)
    assert run.target.device.type == "cuda"
    assert run.target.model.dtype == torch.float32
    run.train()
    said = capfd.readouterr().err
    assert "target.dtype: float32, train.precision: bf16-mixed" in said
    assert said.count("target.dtype: float32: matrices are multiplied in TF32 (train.tf32)") == 1
    assert cuda.operations > 1000


def test_a_head_trains_on_the_gpu(
    tmp_path: Path, target_folder: Path, cuda: Happenings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path)
    sections = {
        "target": {"model": str(target_folder)},
        "head": {"kind": "acceptance", "drafter": str(target_folder), "num_blocks": 1},
        "data": {
            "max_length": 40,
            "sources": [{"kind": "text", "path": str(tmp_path / "text.txt")}],
            "annotate": {"kind": "acceptance", "held_out": 0.3},
        },
        "train": {"max_steps": 4, "batch_size": 16, "warmup_steps": 1, "eval_every_steps": 2, "loggers": ["csv"]},
        "eval": dict.fromkeys(("prompts", "validation_prompts"), str(tmp_path / "prompts.jsonl")),
    }
    run = HeadRun(read_recipe(json.dumps({"name": "head", **sections}), source="head"), tmp_path / "run")
    assert run.recipe.train.precision == "fp32"
    places: set[tuple[str, str]] = set()
    step = HeadModule.training_step

    def looked_at(self: HeadModule, batch: Any, index: int) -> Any:
        places.add((batch.rows.features_ND.device.type, next(self.trained.parameters()).device.type))
        return step(self, batch, index)

    monkeypatch.setattr(HeadModule, "training_step", looked_at)
    run.train()
    assert places == {("cuda", "cuda")}
    assert cuda.operations > 100
