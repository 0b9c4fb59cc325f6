"""A DFlash2 checkpoint in the published layout: imported, it has the tensors and fields of the file; others are refused."""

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
from drafttrain.drafters.dflash2.dflash2 import DFlash2
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.importers.convert import import_folder
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.test_dspark import all_logits
from tests.importers import given

BLOCK: dict[str, Any] = {
    **{"block_size": 4, "mask_token_id": 256, "target_layer_ids": [0, 2], "conv_kernel_size": 2},
    **{"conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5},
}


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


def tensors() -> dict[str, Tensor]:
    """Return the tensors of a published file of two layers."""
    width = given.WIDTH
    shapes = given.block() | {
        "candidate_selector.predecessor_codebook": (given.VOCABULARY, 6),
        "candidate_selector.successor_codebook": (given.VOCABULARY, 6),
        "candidate_selector.hidden_projection.weight": (6, width),
    }
    for number in range(2):
        prefix = f"layers.{number}."
        for part in ("attention_conv", "mlp_conv"):
            shapes[f"{prefix}{part}.base_kernel"] = (2, 2, width)
            shapes[f"{prefix}{part}.kernel_projection.weight"] = (2 * 2 * 4, width)
    return given.drawn(shapes)


def written(
    folder: Path, more: dict[str, Tensor] | None = None, *, top: dict[str, Any] | None = None, **block: Any
) -> Path:
    """Write a folder as z-lab does, with the size of a block in the section."""
    config = {
        "architectures": ["DFlash2DraftModel"],
        "auto_map": {"AutoModel": "dflash2.DFlash2DraftModel"},
        **{**given.LLAMA, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16, "is_causal": False},
        **{"num_target_layers": 4, "layer_types": ["full_attention"] * 2},
        "dflash_config": {key: value for key, value in (BLOCK | block).items() if value is not None},
        **(top or {}),
    }
    return given.write(folder, tensors() | (more or {}), config)


def test_an_imported_drafter_is_that_of_the_file_and_is_written_again(target, tmp_path):
    source, out = written(tmp_path / "theirs"), tmp_path / "out"
    import_folder(source, out, target=target.name)
    about = read_about(out)
    assert about is not None
    assert about.kind == "dflash2"
    read = read_drafter(out, target)
    assert isinstance(read, DFlash2)
    assert (read.block_size, read.num_depths, read.taps, read.causal) == (4, 3, (1, 3), False)
    assert read.candidate_selector.top_k == 5
    export_as("zlab", out, tmp_path / "again", target_config=read_target_config(Path(target.name), name=target.name))
    theirs = load_file(source / "model.safetensors")
    for folder in (out, tmp_path / "again"):
        ours = load_file(folder / "model.safetensors")
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["dflash_config"] == BLOCK | {"causal": False}
    # The control: the two codebooks exchanged.
    swapped = {
        f"candidate_selector.{one}_codebook": theirs[f"candidate_selector.{other}_codebook"]
        for one, other in (("predecessor", "successor"), ("successor", "predecessor"))
    }
    import_folder(written(tmp_path / "swapped", swapped), tmp_path / "out2", target=target.name)
    rows, others = (
        all_logits(target, read_drafter(folder, target), [*range(3, 15)])[4, 2] for folder in (out, tmp_path / "out2")
    )
    seen = rows.isfinite()
    assert (rows - others)[seen].abs().max() > 1e-3


def test_the_other_writers_names_are_read(target, tmp_path):
    """NeMo Automodel's class and size of a block; a codebook that was stored as an embedding."""
    top = {"architectures": ["Qwen3DFlash2DraftModel"], "block_size": 4}
    source = written(tmp_path / "theirs", top=top, block_size=None)
    stored = load_file(source / "model.safetensors")
    name = "candidate_selector.successor_codebook"
    stored[f"{name}.weight"] = stored.pop(name)
    given.write(source, stored, json.loads((source / "config.json").read_text()))
    made = import_folder(source, tmp_path / "out", target=target.name)
    assert made.files.config["architectures"] == ["DFlash2DraftModel"]
    assert torch.equal(made.files.tensors[name], tensors()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selector_rank": 7}, "predecessor_codebook: shape [257, 6], must be [257, 7]"),
        ({"selector_top_k": None}, "dflash_config.selector_top_k must be a whole number of 1..65536, got None"),
        ({"conv_group_size": 5}, "dflash_config.conv_group_size must divide hidden_size, 32, got 5"),
        ({"output_multiplier": 0.5}, "dflash_config.output_multiplier is 0.5, must be 1.0"),
        ({"input_embedding_scale": 2.0}, "dflash_config.input_embedding_scale is 2.0, must be 1"),
        ({"final_logit_softcapping": 30.0}, "dflash_config.final_logit_softcapping is 30.0, must be None"),
        ({"block_size": None}, "block_size, on the first level or in dflash_config, must be one number, got []"),
        ({"top": {"block_size": 5}}, "block_size, on the first level or in dflash_config, must be one number"),
        ({"projector_type": "dspark"}, "it would be another kind of drafter"),
        ({"projector_type": "domino"}, "has the marks of dflash2 and domino"),
        (
            {"top": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": True}},
            "sliding_window is 8",
        ),
    ],
)
def test_what_is_wrong_is_named(target, changes, message, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        import_folder(written(tmp_path / "theirs", **changes), tmp_path / "out", target=target.name)
    assert message in str(refused.value)
