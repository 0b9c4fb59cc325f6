"""A whole recipe of every kind on one GPU: data, training, a stop, a resume, validation inside, export, evaluation of the files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import Interrupted
from drafttrain.pipeline.data import write_texts as write_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.pipeline.search_run import SearchRun
from tests.cuda.happenings import Happenings
from tests.cuda.kinds import KINDS, ON_POLICY, SEARCHED, recipe, write_texts

pytestmark = pytest.mark.pretended_cuda

WAYS = {**KINDS, "on_policy": ON_POLICY}


def stop_in_step(run: DrafterRun, step: int) -> None:
    """Ask this process to stop when the drafter is trained in a step, from 0."""
    calls = []

    def ask(module: torch.nn.Module, inputs: Any) -> None:
        if module.training:
            calls.append(inputs[0].step)
            if calls[-1] == step:
                os.kill(os.getpid(), signal.SIGTERM)

    run.drafter.register_forward_pre_hook(ask)


@pytest.mark.parametrize("name", WAYS)
def test_every_kind_goes_all_the_way_on_one_gpu(
    name: str, tmp_path: Path, target_folder: Path, cuda: Happenings
) -> None:
    write_texts(tmp_path)
    made = recipe(WAYS[name], target=target_folder, folder=tmp_path)
    run = DrafterRun(made, tmp_path / "run")
    write_data(run)
    assert run.target.device == next(run.drafter.parameters()).device == torch.device("cuda:0")
    stop_in_step(run, 0)
    with pytest.raises(Interrupted):
        run.train()
    assert (run.folder.train / "checkpoints" / "step-00000001.ckpt").exists()
    # As another process does, which has nothing but the files.
    run = DrafterRun(made, tmp_path / "run")
    run.train()
    done = run.export_best()
    assert done.last_step == made.train.max_steps
    folders = {"drafter": run.folder.drafter, "start": run.folder.start}
    result = evaluate_folders(folders, run.target, made.eval, dropped=[])
    assert result.temperatures[0].drafters["drafter"].parity.exact
    assert cuda.operations > 1000


@pytest.mark.parametrize("name", SEARCHED)
def test_every_searched_kind_goes_all_the_way_on_one_gpu(name: str, tmp_path: Path, target_folder: Path) -> None:
    write_texts(tmp_path)
    made = recipe(SEARCHED[name], target=target_folder, folder=tmp_path)
    run = SearchRun(made, tmp_path / "run")
    write_data(run)
    run.train()
    run.export_best()
    result = evaluate_folders({"drafter": run.folder.drafter}, run.target, made.eval, dropped=[])
    assert result.temperatures[0].drafters["drafter"].parity.exact
