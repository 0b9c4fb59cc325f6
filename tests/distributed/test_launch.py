"""How many processes a training gets, and which exit code their failure has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DrafttrainError, Interrupted, RecipeError
from drafttrain.distributed import launch
from drafttrain.distributed.world import LAUNCHED


@pytest.mark.parametrize(
    ("recipe", "overrides", "wanted"),
    [
        ("tiny_eagle3", [], 8),
        ("tiny_eagle3", ["train.devices=2"], 2),
        ("tiny_acceptance", [], 1),
        ("tiny_acceptance", ["train.devices=2"], 2),
        ("online", [], 1),
    ],
)
def test_one_process_per_gpu_except_for_heads_and_online_learning(
    monkeypatch: pytest.MonkeyPatch, recipe: str, overrides: list[str], wanted: int
) -> None:
    """Online learning is one process, and a head is small: on a machine of eight GPUs neither starts eight."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launch.processes_wanted(load_recipe(recipe, overrides)) == wanted


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([-9, 75], DrafttrainError.exit_code),
        ([75, 75], Interrupted.exit_code),
        ([1, 2], RecipeError.exit_code),
        ([2, -15], RecipeError.exit_code),
        ([1, -9], DrafttrainError.exit_code),
        ([-11], DrafttrainError.exit_code),
    ],
)
def test_the_exit_code_is_that_of_the_process_with_a_reason(codes: list[int], expected: int) -> None:
    failures = [SimpleNamespace(exitcode=code, timestamp=at) for at, code in enumerate(codes)]
    assert launch._code(failures) == expected
