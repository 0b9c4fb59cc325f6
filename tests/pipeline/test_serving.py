"""Formats and engines behind a drafter folder: what is current, and which target an engine is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from drafttrain.checkpoint import read_drafter
from drafttrain.cli import app
from drafttrain.config.bundled import bundled_recipes
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.drafters.medusa.settings import JointSettings
from drafttrain.environments.environment import EngineError
from drafttrain.export.settings import ExportSettings
from drafttrain.pipeline.data import check_data_engines
from drafttrain.pipeline.formats import folder_as, formats_are_current, formats_of, write_formats
from drafttrain.pipeline.serving import check_engines, served_folder, with_formats
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from tests.export import folders


@pytest.fixture(scope="module")
def settings(tiny_folder) -> TargetSettings:
    return TargetSettings(model=str(tiny_folder))


@pytest.fixture(scope="module")
def target(settings) -> Target:
    return Target.load(settings)


def test_an_engine_is_given_the_target_that_the_heads_stand_on(settings, target, tmp_path):
    """Medusa-2: with adapters beside the heads it is the target with these merged, else the target's own folder."""
    with served_folder(settings, target, target) as folder:
        assert folder == Path(settings.model or "")
    drafter = folders.drafter_of("medusa", target, joint=JointSettings())
    source = folders.save(drafter, tmp_path / "drafter", target)
    standing = read_drafter(source, target).adapted(target)
    assert standing is not target
    with served_folder(settings, standing, target) as folder:
        again = Target.load(TargetSettings(model=str(folder)))
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        merged, read, plain = (one.model(tokens).logits for one in (standing, again, target))
    assert torch.allclose(merged, read, atol=1e-6)
    assert not torch.allclose(merged, plain, atol=1e-3)


def test_formats_are_current_until_their_drafter_changes(settings, target, tmp_path):
    source = folders.save(folders.drafter_of("medusa", target), tmp_path / "drafter", target)
    wanted = ExportSettings(to=["vllm"])
    assert not formats_are_current(source, ["vllm"], settings)
    assert write_formats(source, wanted, settings) == {"vllm": tmp_path / "drafter.vllm"}
    assert formats_are_current(source, ["vllm"], settings)
    folders.damage(source, lambda tensors, _: tensors["lm_heads.0.weight"].add_(1))
    assert not formats_are_current(source, ["vllm"], settings)


def test_a_builtin_target_is_named_to_engines_by_its_folder(tmp_path):
    """`vllm serve` of a folder in the format of speculators loads the target that it names."""
    settings = TargetSettings(model="builtin:target")
    drafter = folders.drafter_of("eagle3", Target.load(settings))
    source = folders.save(drafter, tmp_path / "drafter", Target.load(settings))
    written = write_formats(source, ExportSettings(to=["speculators"]), settings)["speculators"]
    config = json.loads((written / "config.json").read_text())
    named = Path(config["speculators_config"]["verifier"]["name_or_path"])
    assert named == resolve_folder("builtin:target")
    assert formats_are_current(source, ["speculators"], settings)


def test_nothing_is_written_where_one_format_has_no_place_for_the_kind(settings, target, tmp_path):
    source = folders.save(folders.drafter_of("medusa", target), tmp_path / "drafter", target)
    with pytest.raises(CheckpointError, match=r"speculators cannot hold drafter\.kind medusa"):
        write_formats(source, ExportSettings(to=["vllm", "speculators"]), settings)
    assert not folder_as(source, "vllm").exists()


def test_an_engine_brings_the_format_that_it_reads():
    assert formats_of(ExportSettings(to=["sglang"], verify=["vllm"]), "eagle3") == ["sglang", "vllm"]
    assert formats_of(ExportSettings(to=["speculators"], verify=["vllm"]), "eagle3") == ["speculators"]
    assert formats_of(ExportSettings(verify=["openvino", "transformers"]), "causal_lm") == ["openvino"]
    assert formats_of(ExportSettings(to=["hf"], verify=["transformers"]), "causal_lm") == ["hf"]
    assert formats_of(ExportSettings(verify=["vllm"]), "mtp") == ["checkpoint"]


def test_a_format_is_proven_in_the_engines_that_read_it_and_run_the_kind():
    assert with_formats(ExportSettings(), ["vllm"], "medusa", verify=True).verify == ["vllm"]
    assert with_formats(ExportSettings(), ["hf"], "medusa", verify=True).verify == ["vllm"]
    assert with_formats(ExportSettings(), ["hf"], "causal_lm", verify=True).verify == ["transformers", "vllm"]
    assert with_formats(ExportSettings(verify=["transformers"]), ["hf"], "causal_lm", verify=True).verify == [
        "transformers"
    ]
    assert with_formats(ExportSettings(verify=["vllm"]), ["hf"], "causal_lm", verify=False).verify == []
    with pytest.raises(CheckpointError, match="no engine here runs causal_lm and reads sglang"):
        with_formats(ExportSettings(), ["sglang"], "causal_lm", verify=True)


def test_an_engine_that_cannot_run_the_kind_is_refused_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "none"))
    with pytest.raises(
        CheckpointError, match=r"openvino runs no drafter of kind medusa[\s\S]*Engines for medusa: vllm"
    ):
        check_engines(ExportSettings(verify=["openvino"]), "medusa", where=tmp_path)
    for settings in (ExportSettings(to=["openvino"]), ExportSettings(verify=["openvino"])):
        with pytest.raises(EngineError, match="drafttrain engines install openvino"):
            check_engines(settings, "causal_lm", where=tmp_path)
    check_engines(ExportSettings(to=["vllm"], verify=["transformers"]), "causal_lm", where=tmp_path)


# Layer skipping is searched on 64 texts, which the target writes itself.
EIGHT_BILLION = [recipe.path for recipe in bundled_recipes() if "8b" in recipe.name and "layer_skip" not in recipe.name]


@pytest.mark.parametrize("path", EIGHT_BILLION, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["fit", "gen"])
def test_a_recipe_whose_writer_is_not_installed_names_the_fallback_before_anything_is_loaded(
    path: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    result = CliRunner().invoke(app, [command, str(path), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == RecipeError.exit_code
    said = " ".join(result.stderr.split())
    assert "data.generate.backend: vllm is not installed here: drafttrain engines install vllm" in said
    assert "'data.generate.backend={kind: builtin}'" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", EIGHT_BILLION, ids=lambda path: path.stem)
def test_recipes_of_large_targets_have_shards_for_64_devices_and_a_fallback(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    recipe = load_recipe(path)
    assert recipe.data.generate is not None
    assert recipe.data.generate.num_records >= 4 * 64 * recipe.data.generate.records_per_shard
    check_data_engines(load_recipe(path, ["data.generate.backend={kind: builtin}"]), tmp_path)
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "manifest.json").write_text("{}")
    check_data_engines(recipe, tmp_path)
