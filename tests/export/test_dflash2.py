"""DFlash2 in z-lab's layout: the published fields and names; what readers lack is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import check_exported, converted, export_as
from tests.export import folders


def test_the_files_have_the_published_fields_and_the_same_tensors(source, target_config, tmp_path):
    folder = source("dflash2")
    export_as("zlab", folder, tmp_path / "made", target_config=target_config)
    check_exported("zlab", folder, tmp_path / "made", target_config=target_config)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert "drafttrain" not in config
    assert (config["architectures"], config["block_size"], config["is_causal"]) == (["DFlash2DraftModel"], 4, False)
    wanted = {
        **{"block_size": 4, "mask_token_id": 1, "causal": False, "conv_kernel_size": 2, "conv_group_size": 16},
        **{"selector_rank": 6, "selector_top_k": 5},
    }
    assert {key: config["dflash_config"].get(key) for key in wanted} == wanted
    ours, made = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "made"))
    assert ours.keys() == made.keys()
    assert all(torch.equal(ours[name], made[name]) for name in ours)
    # As readers define them: the codebooks are no modules.
    assert {name for name in made if "selector" in name or "layers.0.mlp_conv" in name} == {
        "candidate_selector.predecessor_codebook",
        "candidate_selector.successor_codebook",
        "candidate_selector.hidden_projection.weight",
        "layers.0.mlp_conv.base_kernel",
        "layers.0.mlp_conv.kernel_projection.weight",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_from_anchor": True}, "sample_from_anchor is true: readers take slot s for a guess of token s"),
        ({"draft_vocab_size": 100}, "draft_vocab_size is 100: readers have the target's vocabulary"),
    ],
)
def test_what_readers_lack_is_refused(settings, message, source, target_config):
    with pytest.raises(CheckpointError, match=message):
        converted("zlab", source("dflash2", **settings), target_config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("candidate_selector.successor_codebook"), "successor_codebook: missing"),
        (
            lambda t, _: t.update({"candidate_selector.successor_codebook.weight": torch.ones(257, 6)}),
            "successor_codebook.weight: this layout has no such tensor",
        ),
        (lambda _, c: c["dflash_config"].update(selector_rank=7), "codebook: shape [257, 6], must be [257, 7]"),
        (lambda _, c: c["dflash_config"].update(conv_group_size=5), "dflash_config.conv_group_size must divide"),
    ],
)
def test_a_damaged_folder_is_refused(change, message, source, target_config, tmp_path):
    folder = folders.damage(source("dflash2"), change)
    with pytest.raises(CheckpointError) as refused:
        export_as("zlab", folder, tmp_path / "made", target_config=target_config)
    assert message in str(refused.value)
