"""A drafter on the second GPU, its target on the first: as `train.device: cuda:1` asks for, of the kinds that allow it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import RecipeError
from drafttrain.pipeline.data import write_texts as write_data
from drafttrain.pipeline.drafter_run import DrafterRun
from tests.cuda.kinds import KINDS, ON_POLICY, recipe, write_texts

pytestmark = pytest.mark.pretended_cuda

WAYS = {**KINDS, "on_policy": ON_POLICY}


@pytest.mark.parametrize("name", WAYS)
def test_every_kind_trains_beside_its_target_or_is_refused_by_name(
    name: str, tmp_path: Path, target_folder: Path
) -> None:
    write_texts(tmp_path)
    kind = WAYS[name]
    if {"joint", "tune"} & kind.drafter.keys():
        with pytest.raises(RecipeError, match=r"train.device: cuda:1: drafter.(joint|tune) trains the target itself"):
            recipe(kind, target=target_folder, folder=tmp_path, train={"device": "cuda:1"})
        return
    if name == "hidden_transfer":
        with pytest.raises(RecipeError, match=r"train.device: cuda:1: hidden_transfer trains inside the target"):
            recipe(kind, target=target_folder, folder=tmp_path, train={"device": "cuda:1"})
        return
    made = recipe(kind, target=target_folder, folder=tmp_path, train={"device": "cuda:1", "max_steps": 2})
    run = DrafterRun(made, tmp_path / "run")
    assert next(run.drafter.parameters()).device == torch.device("cuda:1")
    write_data(run)
    run.train()
    run.export_best()
    assert (run.folder.drafter / "model.safetensors").exists()
