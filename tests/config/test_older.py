"""The recipe of a run folder that an older version wrote is translated to current keys; a user's recipe is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafttrain.config.fields import fields_of
from drafttrain.config.load import load_recipe
from drafttrain.config.older import TRANSLATED
from drafttrain.config.recipe import Recipe
from drafttrain.core.errors import RecipeError
from drafttrain.pipeline.auto_types import resolve_auto_types
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.folder import RunFolder

HELD = Path(__file__).parent / "older_run.yaml"
"""What `fit tiny_eagle3` wrote into its run folder before train.accumulation was replaced."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return older(tmp_path)


def older(folder: Path, *changes: tuple[str, str]) -> Path:
    """Write a run folder in which some lines are others."""
    text = HELD.read_text(encoding="utf-8")
    for line, other in changes:
        assert text.count(f"  {line}\n") == 1, line
        text = text.replace(f"  {line}\n", f"  {other}\n")
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


def test_every_replaced_key_is_read() -> None:
    replaced = {
        section: sorted(kept)
        for section, field in fields_of(Recipe).items()
        if (kept := getattr(field.hint, "REPLACED", None))
    }
    assert replaced == {"train": sorted(TRANSLATED)}


def test_a_run_goes_on_by_its_folder_and_by_its_recipe(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(str(folder))
    assert capfd.readouterr().err == (
        f"{folder}: written by an older version; read train.accumulation: 1 as train.records_per_device: null, "
        "no train.tf32 as train.tf32: false\n"
    )
    assert (recipe.train.records_per_device, recipe.train.tf32, recipe.target.dtype) == (None, False, "float32")
    assert resolve_auto_types(recipe, None) == recipe
    run = DrafterRun(load_recipe("tiny_eagle3"), folder)
    said = capfd.readouterr().err
    assert f"{folder}: continuing" in said
    assert "older version" not in said, "it is printed once, however often the folder is read"
    assert run.recipe == recipe
    again = DrafterRun(load_recipe("tiny_eagle3"), folder)
    assert again.recipe == recipe, "and once more, now that the folder is written as today"
    assert "older version" not in capfd.readouterr().err
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-1.ckpt").touch()
    with pytest.raises(RecipeError, match=r"(?s)another recipe.*tf32: false there, true here"):
        DrafterRun(load_recipe("tiny_eagle3", ["train.tf32=true"]), folder)


@pytest.mark.parametrize(
    ("count", "batch", "devices", "most"),
    [(2, 8, "null", 4), (3, 8, "null", 3), (4, 8, "2", 1), (8, 8, "4", 1), (1, 8, "2", None)],
)
def test_micro_batches_become_the_records_that_they_had_at_most(
    tmp_path: Path, count: int, batch: int, devices: str, most: int | None
) -> None:
    changed = {"batch_size: 16": batch, "accumulation: 1": count, "devices: null": devices}
    folder = older(tmp_path, *((line, f"{line.partition(':')[0]}: {value}") for line, value in changed.items()))
    assert load_recipe(str(folder)).train.records_per_device == most


def test_a_type_that_was_as_stored_stays_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = RunFolder(older(tmp_path, ("dtype: float32\n  device: auto", "dtype: auto\n  device: auto"))).stored_recipe()
    assert held is not None
    assert held.target.dtype == "stored"
    assert "target.dtype: auto as target.dtype: stored" in capfd.readouterr().err
    assert resolve_auto_types(load_recipe("tiny_eagle3"), held).target.dtype == "stored"


def test_a_recipe_of_a_user_is_told_of_the_new_key(folder: Path) -> None:
    for path, overrides in ((folder / "recipe.yaml", []), (folder, ["train.accumulation=1"])):
        with pytest.raises(RecipeError, match="this key was replaced by records_per_device"):
            load_recipe(str(path), overrides)


def test_a_folder_of_today_is_read_as_it_stands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("name: a\ntarget: {model: builtin:target, dtype: auto}\n", encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(str(tmp_path))
    assert "older" not in capfd.readouterr().err


def test_a_source_of_logs_is_read_with_its_older_key(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: logs\nseed: 0\ndata:\n  sources:\n    - kind: serving_logs\n      path: builtin:serving_log\n      law: false\n"
        "drafter: {kind: causal_lm}\nloss: {kind: ce}\n"
    )
    assert load_recipe(str(tmp_path)).data.sources[0].logprobs is False
    mine = tmp_path / "mine.yaml"
    mine.write_text((tmp_path / "recipe.yaml").read_text())
    with pytest.raises(RecipeError, match=r"law: unknown key"):
        load_recipe(str(mine))


def test_prompts_from_logs_are_read_with_the_older_key_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: logs\nseed: 0\ntarget: {model: builtin:target}\ndata:\n  generate:\n"
        "    prompts: {kind: serving_logs, path: builtin:serving_log, law: false}\n"
        "  sources: [{kind: generated}]\ndrafter: {kind: causal_lm}\nloss: {kind: ce}\n"
    )
    recipe = load_recipe(str(tmp_path))
    assert recipe.data.generate is not None
    assert recipe.data.generate.prompts.logprobs is False
