"""The layer goes back into its target's checkpoint: bit for bit if it was not trained, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.core.digests import weights_digest
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters import drafters
from drafttrain.export.convert import check_exported, export_as, read_target_config
from tests.drafters.mtp_models import deepseek_folder, loaded, mimo_folder, with_config
from tests.export import folders

MAKERS = {"mimo": mimo_folder, "deepseek": deepseek_folder}


def drafter_folder(target_folder: Path, folder: Path, *, change: bool = False, **settings: Any) -> Path:
    """Write the drafter folder of a target's own layer, changed or not."""
    target = loaded(target_folder, dtype="float32")
    entry: Any = drafters.entry("mtp")
    made = entry.component.create(entry.settings(**settings), target=target, tokenizer=target.tokenizer)
    if change:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter))
    return folders.save(made, folder, target)


def stitched(source: Path, target: Path, folder: Path) -> dict[str, torch.Tensor]:
    export_as("checkpoint", source, folder, target_config=read_target_config(target, name="the/target"))
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", MAKERS)
def test_an_untrained_layer_gives_the_same_checkpoint_bit_for_bit(layout, tmp_path):
    target = MAKERS[layout](tmp_path / "target")
    before = load_file(target / "model.safetensors")
    after = stitched(drafter_folder(target, tmp_path / "drafter"), target, tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (target / "config.json").read_text()
    )


@pytest.mark.parametrize("layout", MAKERS)
def test_a_trained_layer_changes_its_own_tensors_alone_and_not_the_target(layout, tmp_path):
    target = MAKERS[layout](tmp_path / "target")
    digest, before = weights_digest(target / "model.safetensors"), load_file(target / "model.safetensors")
    after = stitched(drafter_folder(target, tmp_path / "drafter", change=True), target, tmp_path / "out")
    assert weights_digest(target / "model.safetensors") == digest
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = {"mimo": "model.mtp_layers.0.", "deepseek": "model.layers.3."}[layout]
    buffers = {f"{prefix}mlp.gate.e_score_correction_bias"}
    assert changed == {name for name in before if name.startswith(prefix)} - buffers


def test_a_layer_trained_in_float32_gets_the_type_of_its_checkpoint(tmp_path):
    target = mimo_folder(tmp_path / "target")
    half = {name: tensor.bfloat16() for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    after = stitched(drafter_folder(target, tmp_path / "drafter"), target, tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in half.items())


def test_files_without_a_replaced_tensor_are_links_and_configurations_are_copies(tmp_path):
    target = mimo_folder(tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    layer = {name: tensor for name, tensor in tensors.items() if ".mtp_layers." in name}
    (target / "model.safetensors").unlink()
    parts = {
        "model-00001-of-00002.safetensors": tensors.keys() - layer.keys(),
        "model-00002-of-00002.safetensors": layer,
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, target / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    after = stitched(drafter_folder(target, tmp_path / "drafter", change=True), target, tmp_path / "out")
    assert after.keys() == tensors.keys()
    base, own = ((tmp_path / "out" / file, target / file) for file in parts)
    assert base[0].stat().st_ino == base[1].stat().st_ino
    assert own[0].stat().st_ino != own[1].stat().st_ino
    assert (tmp_path / "out" / "config.json").stat().st_ino != (target / "config.json").stat().st_ino


def test_a_changed_tensor_in_the_stitched_checkpoint_is_found(tmp_path):
    target = mimo_folder(tmp_path / "target")
    source = drafter_folder(target, tmp_path / "drafter")
    held = stitched(source, target, tmp_path / "out")
    left, right = held["model.mtp_layers.0.input_proj.weight"].chunk(2, dim=1)
    held["model.mtp_layers.0.input_proj.weight"] = torch.cat([right, left], dim=1)
    save_file(held, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mtp_layers\.0\.input_proj\.weight: 8\d+ of 8192 values differ"):
        check_exported(
            "checkpoint", source, tmp_path / "out", target_config=read_target_config(target, name="the/target")
        )


def test_a_layer_of_another_layout_is_refused(tmp_path):
    target = mimo_folder(tmp_path / "target")
    source = drafter_folder(target, tmp_path / "drafter", init="random", layout="deepseek")
    with pytest.raises(CheckpointError, match="layout is deepseek, the target's layer has the layout mimo"):
        stitched(source, target, tmp_path / "out")


def test_a_drafter_for_a_target_without_such_a_layer_cannot_be_stitched(tmp_path, save_llama):
    target = save_llama()
    source = drafter_folder(target, tmp_path / "drafter", init="random")
    with pytest.raises(CheckpointError, match="no next-token-prediction layer in its files"):
        stitched(source, target, tmp_path / "out")


def test_mimo_is_loaded_as_the_qwen2_model_that_it_is(tmp_path):
    folder = mimo_folder(tmp_path / "target")
    own = loaded(folder)
    as_qwen2 = loaded(with_config(folder, model_type="qwen2"))
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(own.model(tokens).logits, as_qwen2.model(tokens).logits)
    assert type(own.model).__name__ == "MiMoForCausalLM"
