"""A tiny target, and drafter folders with an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from drafttrain.target_model import Target, TargetSettings
from tests.export import folders
from tests.serving.evaluations import evaluation


@pytest.fixture(scope="module")
def target(save_llama: Callable[..., Path]) -> Target:
    """A tiny target of four layers."""
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


@pytest.fixture
def evaluated(save_llama, tmp_path):
    """A function that writes a drafter folder of a kind with an evaluation beside it."""
    target = Target.load(TargetSettings(model=str(save_llama(num_layers=4))))

    def folder(kind: str):
        evaluation({1: 1.5, 3: 2.5, 5: 2.6}, length=3, cost=0.1).write(tmp_path / "eval.json")
        return folders.save(folders.drafter_of(kind, target), tmp_path / "drafter", target)

    return folder
