"""A checkpoint with a next-token-prediction layer is imported as a drafter for itself, and goes back unchanged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters import drafters
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.importers.convert import import_folder
from tests.drafters.mtp_models import deepseek_folder, loaded, mimo_folder

MAKERS = {"mimo": mimo_folder, "deepseek": deepseek_folder}


@pytest.mark.parametrize("layout", MAKERS)
def test_an_imported_layer_is_the_one_that_training_starts_from(layout, tmp_path):
    source, out = MAKERS[layout](tmp_path / "target"), tmp_path / "drafter"
    import_folder(source, out)
    about = read_about(out)
    assert about is not None
    assert (about.kind, about.target) == ("mtp", str(source))
    target = loaded(source, dtype="float32")
    entry = drafters.entry("mtp")
    made = entry.component.create(entry.settings(), target=target, tokenizer=target.tokenizer)
    read = read_drafter(out, target)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    same = {key: value for key, value in json.loads((out / "config.json").read_text()).items() if key != "dtype"}
    assert same == made.config
    export_as("checkpoint", out, tmp_path / "back", target_config=read_target_config(source, name=str(source)))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_continues_from_an_imported_layer(tmp_path):
    source, out = mimo_folder(tmp_path / "target"), tmp_path / "drafter"
    import_folder(source, out)
    target = loaded(source, dtype="float32")
    entry = drafters.entry("mtp")
    settings = entry.settings(checkpoint=str(out), num_steps=2, feed="own")
    assert settings.check() == []
    made = entry.component.create(settings, target=target, tokenizer=target.tokenizer)
    assert (made.training, made.own["num_steps"], made.own["feed"]) == (True, 2, "own")


def test_what_is_wrong_with_the_layer_is_named(tmp_path):
    source = mimo_folder(tmp_path / "target")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.mtp_layers.0.hidden_layernorm.weight"]
    tensors["model.mtp_layers.0.self_attn.sinks"] = torch.zeros(2)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        import_folder(source, tmp_path / "drafter")
    assert "hidden_layernorm.weight [64]: missing" in str(refused.value) or "hidden_layernorm" in str(refused.value)
    assert "sinks: this layout has no such tensor" in str(refused.value)
