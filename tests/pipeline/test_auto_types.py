"""Number types that a recipe leaves to the machine are decided once, stored, and kept when the run continues elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.config.load import load_recipe
from drafttrain.core import console
from drafttrain.core.errors import RecipeError
from drafttrain.pipeline import auto_types
from drafttrain.pipeline.auto_types import resolve_auto_types
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.target_model import Target, number_type
from drafttrain.training.precision import float32_products, note_on_float32
from drafttrain.training.settings import TrainSettings

CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """One CUDA device, as far as anyone asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def types_of(name: str, *overrides: str) -> tuple[str, str]:
    recipe = resolve_auto_types(load_recipe(name, list(overrides)), None)
    return recipe.target.dtype, recipe.train.precision


def test_on_a_cpu_all_is_float32() -> None:
    assert types_of("tiny_eagle3") == types_of("tiny_acceptance") == ("float32", "fp32")
    assert types_of("tiny_eagle3", "target.model=/not/here") == ("float32", "fp32"), (
        "the stage that loads it reports that it is missing"
    )
    assert types_of("tiny_eagle3", "target.dtype=bfloat16", "train.precision=bf16-mixed") == ("bfloat16", "bf16-mixed")


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("tiny_eagle3", [], ("float32", "bf16-mixed")),
        ("tiny_acceptance", [], ("float32", "fp32")),
        ("tiny_eagle3", ["train.precision=fp32", "target.dtype=float16"], ("float16", "fp32")),
        ("tiny_eagle3", ["target.device=cpu"], ("float32", "fp32")),
        ("tiny_eagle3", ["target.device=cpu", "train.device=cuda:0"], ("float32", "bf16-mixed")),
        ("tiny_eagle3", ["train.device=cpu"], ("float32", "fp32")),
    ],
)
def test_on_cuda_a_drafter_trains_in_bf16_mixed_and_a_head_does_not(
    name: str, overrides: list[str], expected: tuple[str, str]
) -> None:
    assert types_of(name, *overrides) == expected


def test_a_run_goes_on_in_the_types_that_it_began_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    recipe = load_recipe("tiny_eagle3")
    assert (recipe.target.dtype, recipe.train.precision) == ("auto", "auto")
    for run in (DrafterRun(recipe, tmp_path), DrafterRun(recipe, tmp_path)):
        held = load_recipe(str(tmp_path / "recipe.yaml"))
        assert (held.target.dtype, held.train.precision) == ("float32", "fp32")
        assert run.recipe == held
    request.getfixturevalue("cuda")
    capfd.readouterr()
    assert DrafterRun(recipe, tmp_path).recipe.train.precision == "fp32"
    assert "continues as it started: train.precision: fp32 (auto would be bf16-mixed here)" in capfd.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1.ckpt").touch()
    with pytest.raises(RecipeError, match=r"(?s)another recipe.*precision: fp32 there, bf16-mixed here"):
        DrafterRun(load_recipe("tiny_eagle3", ["train.precision=bf16-mixed"]), tmp_path)


def test_a_run_on_a_cpu_keeps_the_measured_type_and_does_not_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = ["bfloat16"]
    monkeypatch.setattr(auto_types, "number_type", lambda target: measured.pop())
    recipe = load_recipe("tiny_eagle3", ["target.device=cpu"])
    for _ in range(2):
        assert DrafterRun(recipe, tmp_path).recipe.target.dtype == "bfloat16"
    with pytest.raises(IndexError):
        DrafterRun(recipe, tmp_path / "another")


@pytest.mark.parametrize(("speedup", "precision"), [(2.7, "bf16-mixed"), (1.1, "fp32")])
def test_on_a_cpu_a_drafter_of_a_bfloat16_target_trains_in_what_was_measured_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    speedup: float,
    precision: str,
) -> None:
    asked: list[tuple[int, ...]] = []
    console.say_once.cache_clear()
    monkeypatch.setattr(number_type, "bfloat16_speedup", lambda *sizes: asked.append(sizes[2]) or speedup)
    recipe = load_recipe("tiny_eagle3", ["target.device=cpu", "target.dtype=bfloat16"])
    for _ in range(2):
        assert DrafterRun(recipe, tmp_path).recipe.train.precision == precision
    assert asked == [(256,)]
    assert f"train.precision: {precision}: with 256 rows" in " ".join(capfd.readouterr().err.split())
    assert types_of("tiny_eagle3", "target.dtype=bfloat16", "train.precision=fp32") == ("bfloat16", "fp32")
    assert types_of("tiny_eagle3") == ("float32", "fp32"), "a float32 target measures nothing"
    assert types_of("tiny_acceptance", "target.dtype=bfloat16") == ("bfloat16", "fp32"), "nor does a head"
    assert len(asked) == 1


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_what_the_recipe_says_while_a_drafter_trains_on_cuda(allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with float32_products(TrainSettings(tf32=allowed), CUDA):
        assert matmul.allow_tf32 is allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest"), "as Lightning reads it"
        assert torch.backends.mkldnn.matmul.fp32_precision == "none", "products on the CPU are as they were"
    assert matmul.allow_tf32 is before
    with float32_products(TrainSettings(tf32=allowed), torch.device("cpu")):
        assert matmul.allow_tf32 is before


def test_float32_on_a_gpu_says_what_it_costs(tiny_target: Target) -> None:
    exact = TrainSettings(precision="fp32", tf32=False)
    said = note_on_float32(exact, CUDA, tiny_target)
    assert said is not None
    assert said.startswith(
        "train.precision: fp32, target.dtype: float32 without TF32: products of matrices take about 7 times"
    )
    assert "\n" not in said
    assert note_on_float32(TrainSettings(precision="fp32"), CUDA, None) == (
        "train.precision: fp32: matrices are multiplied in TF32 (train.tf32)"
    )
    assert note_on_float32(TrainSettings(precision="bf16-mixed", tf32=False), CUDA, None) is None
    assert note_on_float32(exact, torch.device("cpu"), tiny_target) is None
