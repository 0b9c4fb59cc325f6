"""An XPress checkpoint in the published layout: imported, it drafts as its file says; written again, it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.xpress.xpress import XPress
from drafttrain.importers.convert import import_folder
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.test_dspark import all_logits
from tests.importers import given

HEAD: dict[str, Any] = {
    "xpress_block_size": 4,
    "xpress_rank": 6,
    "xpress_mlp_hidden": 10,
    "xpress_num_passes": 2,
    "xpress_topc": 5,
}


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


def tensors() -> dict[str, Tensor]:
    """Return the tensors of a published file of two layers."""
    width = given.WIDTH
    shapes = given.block() | {
        "xpress_head.w1.weight": (given.VOCABULARY, 6),
        "xpress_head.down_h.weight": (6, width),
        "xpress_head.down_g.weight": (6, width),
        "xpress_head.in_proj.weight": (6, 18),
        "xpress_head.mix.L": (6, 4, 4),
        "xpress_head.mlp.gate_proj.weight": (10, 6),
        "xpress_head.mlp.up_proj.weight": (10, 6),
        "xpress_head.mlp.down_proj.weight": (6, 10),
        "xpress_head.w2.weight": (given.VOCABULARY, 6),
    }
    return given.drawn(shapes)


def config(**fields: Any) -> dict[str, Any]:
    """Return a configuration as the authors' converter writes it; fields that are None are left out."""
    made = {
        "architectures": ["Qwen3XPressModel"],
        **{**given.LLAMA, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16},
        **{"block_size": 4, "num_target_layers": 4, "layer_types": ["full_attention"] * 2},
        "dflash_config": {"mask_token_id": 256, "target_layer_ids": [0, 2]},
        "sample_from_anchor": False,
        **HEAD,
    }
    return {key: value for key, value in (made | fields).items() if value is not None}


def written(folder: Path, more: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    return given.write(folder, tensors() | (more or {}), config(**fields))


def test_an_imported_drafter_has_the_tensors_and_fields_of_the_file(target, tmp_path):
    source, out = written(tmp_path / "theirs"), tmp_path / "out"
    import_folder(source, out, target=target.name)
    about = read_about(out)
    assert about is not None
    assert (about.kind, about.draft) == ("xpress", "greedy")
    read = read_drafter(out, target)
    assert isinstance(read, XPress)
    assert (read.num_depths, read.taps, read.num_passes, read.num_candidates) == (3, (1, 3), 2, 5)
    theirs, ours = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    fields = json.loads((out / "config.json").read_text())
    assert {key: fields[key] for key in HEAD} == HEAD
    # The control: the head's tensors matter.
    other = written(tmp_path / "other", {"xpress_head.mix.L": torch.zeros(6, 4, 4)})
    import_folder(other, tmp_path / "out2", target=target.name)
    rows, others = (
        all_logits(target, read_drafter(folder, target), [*range(3, 15)])[4, 2] for folder in (out, tmp_path / "out2")
    )
    assert (rows - others).abs().max() > 1e-3


def test_missing_fields_are_filled_in(target, tmp_path):
    """With vLLM's defaults; all tokens are corrected, which is exact."""
    missing = {"xpress_block_size": None, "xpress_num_passes": None, "xpress_topc": None, "sample_from_anchor": None}
    made = import_folder(written(tmp_path / "theirs", **missing), tmp_path / "out", target=target.name)
    fields = made.files.config
    assert [fields[key] for key in missing] == [4, 6, 0, False]
    assert len([note for note in made.notes if "is missing: set to" in note and "xpress_" in note]) == 3


def test_a_copy_of_the_targets_head_is_dropped_and_another_refused(target, tmp_path):
    head = target.model.get_output_embeddings().weight.detach().clone()
    made = import_folder(written(tmp_path / "same", {"lm_head.weight": head}), tmp_path / "out", target=target.name)
    assert "lm_head.weight: dropped, it equals the target's" in made.notes
    source = written(tmp_path / "changed", {"lm_head.weight": head + 1})
    with pytest.raises(CheckpointError, match=r"lm_head.weight: .* values differ"):
        import_folder(source, tmp_path / "out2", target=target.name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"xpress_rank": 7}, "xpress_head.in_proj.weight: shape [6, 18], must be [7, 21]"),
        ({"xpress_block_size": 16}, "xpress_block_size must be block_size, 4, got 16"),
        ({"xpress_topc": "all"}, "xpress_topc must be a whole number of 0.."),
        ({"sample_from_anchor": True}, "sample_from_anchor must be false: the root's slot predicts nothing in XPress"),
        ({"dflash_config": None}, "dflash_config"),
    ],
)
def test_what_is_wrong_is_named(target, fields, message, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        import_folder(written(tmp_path / "theirs", **fields), tmp_path / "out", target=target.name)
    assert message in str(refused.value)
