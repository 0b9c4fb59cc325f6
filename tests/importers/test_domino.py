"""A Domino checkpoint in the published layout: imported, it drafts as its definition says; written again, it is the same."""

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
from drafttrain.drafters.domino.domino import Domino
from drafttrain.importers.convert import import_folder
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.test_dspark import all_logits
from tests.importers import given

BLOCK: dict[str, Any] = {
    "projector_type": "domino",
    "mask_token_id": 256,
    "target_layer_ids": [0, 2],
    "emb_dim": 6,
    "gru_hidden_dim": 8,
    "pure_draft_prefix_len": 1,
    "shift_label": True,
}


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


def tensors() -> dict[str, Tensor]:
    """Return the tensors of a published file of two layers."""
    width = given.WIDTH
    shapes = given.block() | {
        "prefix_gru.weight_ih_l0": (24, width),
        "prefix_gru.weight_hh_l0": (24, 8),
        "embed_proj.0.weight": (6, width + 8),
        "embed_proj.2.weight": (given.VOCABULARY, 6),
    }
    return given.drawn(shapes)


def config(**block: Any) -> dict[str, Any]:
    """Return a configuration as SpecForge writes it, with `emb_dim` at the top again."""
    return {
        "architectures": ["DominoDraftModel"],
        "auto_map": {"AutoModel": "domino.DominoDraftModel"},
        **{**given.LLAMA, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16},
        **{"block_size": 4, "num_target_layers": 4, "emb_dim": 6, "layer_types": ["full_attention"] * 2},
        "dflash_config": {key: value for key, value in (BLOCK | block).items() if value is not None},
    }


def written(folder: Path, more: dict[str, Tensor] | None = None, **block: Any) -> Path:
    return given.write(folder, tensors() | (more or {}), config(**block))


@pytest.mark.parametrize("shift_label", [True, False])
def test_an_imported_drafter_has_the_tensors_and_the_convention_of_the_file(target, shift_label, tmp_path):
    source, out = written(tmp_path / "theirs", shift_label=shift_label), tmp_path / "out"
    import_folder(source, out, target=target.name)
    about = read_about(out)
    assert about is not None
    assert about.kind == "domino"
    read = read_drafter(out, target)
    assert isinstance(read, Domino)
    assert (read.num_depths, read.first_slot, read.taps) == ((4, 0, (1, 3)) if shift_label else (3, 1, (1, 3)))
    theirs, ours = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    block = json.loads((out / "config.json").read_text())["dflash_config"]
    assert block == BLOCK | {"shift_label": shift_label, "causal": False}
    # The control: read in the other convention, every row is another.
    other = written(tmp_path / "other", shift_label=not shift_label)
    import_folder(other, tmp_path / "out2", target=target.name)
    rows, others = (
        all_logits(target, read_drafter(folder, target), [*range(3, 15)])[4, 2] for folder in (out, tmp_path / "out2")
    )
    assert (rows - others).abs().max() > 1e-3


def test_missing_fields_are_filled_in_as_specforge_reads_them(target, tmp_path):
    # Of four blocks and two drafter layers, z-lab's choice is the output of block 1, twice.
    fc = given.drawn({"fc.weight": (32, 32)})
    source = written(tmp_path / "theirs", fc, shift_label=None, pure_draft_prefix_len=None, target_layer_ids=None)
    made = import_folder(source, tmp_path / "out", target=target.name)
    block = made.files.config["dflash_config"]
    assert (block["shift_label"], block["pure_draft_prefix_len"], block["target_layer_ids"]) == (False, 0, [1])
    assert len([note for note in made.notes if "is missing: set to" in note and "dflash_config" in note]) == 3


def test_copies_of_the_targets_tensors_are_dropped_and_others_refused(target, tmp_path):
    head = target.model.get_output_embeddings().weight.detach().clone()
    made = import_folder(written(tmp_path / "same", {"lm_head.weight": head}), tmp_path / "out", target=target.name)
    assert "lm_head.weight: dropped, it equals the target's" in made.notes
    source = written(tmp_path / "changed", {"lm_head.weight": head + 1})
    with pytest.raises(CheckpointError, match=r"lm_head.weight: .* values differ"):
        import_folder(source, tmp_path / "out2", target=target.name)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"gru_hidden_dim": 9}, "prefix_gru.weight_ih_l0: shape [24, 32], must be [27, 32]"),
        ({"emb_dim": None}, "dflash_config.emb_dim must be a whole number of 1..65536, got None"),
        ({"pure_draft_prefix_len": 4}, "dflash_config.pure_draft_prefix_len must be a whole number of 0..3, got 4"),
        ({"shift_label": "yes"}, "dflash_config.shift_label must be"),
        ({"mask_token_id": 257}, "dflash_config.mask_token_id must be an id of the target's vocabulary (257), got 257"),
    ],
)
def test_what_is_wrong_is_named(target, block, message, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        import_folder(written(tmp_path / "theirs", **block), tmp_path / "out", target=target.name)
    assert message in str(refused.value)
