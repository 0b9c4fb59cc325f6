"""Domino for SGLang: the published layout without drafttrain's own fields; what SGLang lacks is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import export_as
from tests.export import folders


@pytest.mark.parametrize("shift_label", [True, False])
def test_the_files_have_the_published_fields_and_the_same_tensors(shift_label, source, target_config, tmp_path):
    folder = source("domino", sample_from_anchor=shift_label)
    export_as("sglang", folder, tmp_path / "made", target_config=target_config)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert "drafttrain" not in config
    assert (config["architectures"], config["block_size"]) == (["DominoDraftModel"], 4)
    block = config["dflash_config"]
    assert (block["projector_type"], block["pure_draft_prefix_len"], block["shift_label"]) == ("domino", 1, shift_label)
    assert (block["emb_dim"], block["gru_hidden_dim"], block["mask_token_id"]) == (6, 8, 1)
    ours, made = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "made"))
    assert ours.keys() == made.keys()
    assert all(torch.equal(ours[name], made[name]) for name in ours)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pure_draft_prefix_len": 0}, "pure_draft_prefix_len is 0: SGLang 0.5.23 supports 1 only"),
        ({"draft_vocab_size": 100}, "draft_vocab_size is 100: SGLang 0.5.23 runs Domino with the target's vocabulary"),
    ],
)
def test_what_sglang_lacks_is_refused(settings, message, source, target_config, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        export_as("sglang", source("domino", **settings), tmp_path / "made", target_config=target_config)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("prefix_gru.weight_hh_l0"), "prefix_gru.weight_hh_l0: missing"),
        (
            lambda t, _: t.update({"embed_proj.0.bias": torch.ones(6)}),
            "embed_proj.0.bias: this layout has no such bias",
        ),
        (lambda _, c: c["dflash_config"].update(gru_hidden_dim=9), "prefix_gru.weight_ih_l0: shape [24, 32], must be"),
        (lambda _, c: c["dflash_config"].update(shift_label=False), "dflash_config.shift_label must be"),
    ],
)
def test_a_damaged_folder_is_refused(change, message, source, target_config, tmp_path):
    folder = folders.damage(source("domino"), change)
    with pytest.raises(CheckpointError) as refused:
        export_as("sglang", folder, tmp_path / "made", target_config=target_config)
    assert message in str(refused.value)
