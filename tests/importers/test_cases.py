"""Folders that other projects' code wrote: imported, decoded losslessly and exported, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.export import exporters
from drafttrain.export.convert import check_exported, export_as, exporter_of, read_target_config
from drafttrain.importers.convert import import_folder
from drafttrain.target_model import Target, TargetSettings
from tests.importers.decoding import drafted_and_plain

HERE = ("gguf", "hf", "sglang", "speculators", "transformers", "vllm")
"""Formats that need no engine to be written."""

REFUSED = {
    ("sp_nbf", "sglang"): "norm_before_residual is true: SGLang 0.5.23 has no such variant",
    ("spd_nearest", "sglang"): "norm_before_residual is true: SGLang 0.5.23 has no such variant",
    ("sa_eagle1_bias", "vllm"): "vLLM 0.32.0 silently drops them",
    ("sp_dflash", "transformers"): "the generator computes logits with the target's head only",
    ("gemma2_draft", "gguf"): "model_type is 'gemma2': only llama, qwen2, qwen3 can be written as GGUF",
}
"""Parts of a folder that a format cannot hold, by their effect."""

KINDS = {
    "spd_nearest": "eagle3",
    "sp_nbf": "eagle3",
    "sf_qwen25": "eagle3",
    "sa_eagle1_bias": "eagle",
    "md_1_says2": "medusa",
    "md_v2": "medusa",
    "gemma2_draft": "causal_lm",
    "sp_dflash": "dflash",
}


@pytest.fixture(scope="module")
def cases(shared_folder: Path) -> Path:
    return shared_folder / "cases" / "checkpoints"


@pytest.fixture(scope="module")
def targets(cases) -> dict[str, Target]:
    """The two targets by the word that a case's name begins with; a Gemma 2 computes its attention eagerly."""
    return {
        name: Target.load(TargetSettings(model=str(cases / f"target_{name}"), attention=attention))
        for name, attention in (("llama", "sdpa"), ("gemma2", "eager"))
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_imported_decodes_as_its_target_and_is_exported(name, cases, targets, tmp_path):
    target = targets["gemma2" if name.startswith("gemma2") else "llama"]
    made = import_folder(cases / name, tmp_path / "drafter", target=target.name)
    assert made.files.kind == KINDS[name]
    drafted, plain = drafted_and_plain(read_drafter(tmp_path / "drafter", target), target)
    assert drafted == plain
    target_config = read_target_config(Path(target.name), name=target.name)
    for format in exporters.names():
        if format not in HERE or KINDS[name] not in exporter_of(format).reads:
            continue
        if effect := REFUSED.get((name, format)):
            with pytest.raises(CheckpointError) as caught:
                export_as(format, tmp_path / "drafter", tmp_path / format, target_config=target_config)
            assert len(str(caught.value).splitlines()) == 2
            assert effect in str(caught.value)
        else:
            export_as(format, tmp_path / "drafter", tmp_path / format, target_config=target_config)
            check_exported(format, tmp_path / "drafter", tmp_path / format, target_config=target_config)


def test_a_flag_that_makes_vllm_causal_is_dropped_and_reported(cases, targets, tmp_path):
    made = import_folder(cases / "sp_dflash", tmp_path / "drafter", target=targets["llama"].name)
    assert made.files.config["dflash_config"] == {"mask_token_id": 2, "target_layer_ids": [1, 4, 6], "causal": False}
    assert any("sliding_window_non_causal is false: dropped" in note for note in made.notes)


def test_every_folder_is_accounted_for(cases):
    assert {path.name for path in cases.iterdir()} == {
        *KINDS,
        "gemma2_draft",
        "target_llama",
        "target_gemma2",
    }
