"""EAGLE-3: taps, draft vocabulary, contents of its folder, number of parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.checkpoint import About, read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.eagle.eagle3 import Eagle3Drafter, Eagle3Settings, taps_of
from drafttrain.export.hf import export_hf
from tests.drafters.eagle_models import eagle_drafter, eagle_target, packed

LAYER = [
    "input_layernorm",
    "hidden_norm",
    "post_attention_layernorm",
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
]
NAMES = {"fc.weight", "norm.weight", "lm_head.weight", *(f"midlayer.{part}.weight" for part in LAYER)}


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.mark.parametrize("num_layers", range(3, 81))
def test_taps_are_three_different_blocks_for_any_depth(num_layers):
    early, middle, late = taps_of(num_layers)
    assert 0 <= early < middle < late < num_layers
    assert early <= num_layers / 3
    assert late >= num_layers / 2


def test_taps_of_known_depths():
    assert taps_of(32) == [2, 16, 29]
    assert taps_of(3) == [0, 1, 2]
    assert taps_of(6, [0, 2, 5]) == [0, 2, 5]


@pytest.mark.parametrize("taps", [[], [1, 1, 2], [0, 1, 4], [2, 1, 3], [4], [-1, 1, 2]])
def test_equal_or_impossible_taps_are_refused(target, taps):
    with pytest.raises(CheckpointError, match=r"drafter.taps must be one or more different blocks .* 0\.\.3"):
        Eagle3Drafter.create(Eagle3Settings(taps=taps), target=target, tokenizer=None)


def test_a_recipe_with_equal_taps_is_refused_and_so_is_a_shallow_target():
    assert "one or more different blocks" in Eagle3Settings(taps=[1, 1, 2]).check()[0]
    assert "one or more different blocks" in Eagle3Settings(taps=[]).check()[0]
    assert Eagle3Settings(taps=[0, 1, 2, 5]).check() == []
    with pytest.raises(
        CheckpointError, match=r"drafter\.taps is null, .* this target has 2 layers: name one or more of 0\.\.1"
    ):
        Eagle3Drafter.create(Eagle3Settings(), target=eagle_target(num_layers=2), tokenizer=None)


@pytest.mark.parametrize("taps", [[0, 2, 3], [1], [0, 3], [0, 1, 2, 3]], ids=str)
def test_only_the_taps_are_read_and_every_tap_matters(target, taps):
    drafter = eagle_drafter("eagle3", target, taps=taps)
    batch, _ = packed(target, drafter, (8,), width=8)
    assert set(batch.target.hidden_BTD) == set(taps)
    before = drafter(batch).states_BTD[1]
    for tap in taps:
        hidden = dict(batch.target.hidden_BTD)
        hidden[tap] = hidden[tap] + 1
        changed = drafter(replace(batch, target=replace(batch.target, hidden_BTD=hidden))).states_BTD[1]
        assert not torch.allclose(changed, before)


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("norm", [None, "fc_norm", "norm_before_fc"])
@pytest.mark.parametrize("taps", [[0, 1, 3], [2], [0, 1, 2, 3]], ids=str)
def test_the_number_of_parameters_follows_the_formula(target, size, norm, taps):
    more = {} if norm is None else {norm: True}
    drafter = eagle_drafter("eagle3", target, draft_vocab_size=size, intermediate_size=48, taps=taps, **more)
    f = len(taps)
    d, q, kv, i, v = 32, 32, 16, 48, size or 257
    wanted = f * d * d + 2 * d * (q + 2 * kv) + q * d + 3 * d * i + v * d + 4 * d + f * d * (norm is not None)
    assert sum(p.numel() for p in drafter.parameters()) == wanted


def test_the_draft_vocabulary_is_the_most_frequent_labels(target):
    drafter = eagle_drafter("eagle3", target, draft_vocab_size=4)
    counts = np.zeros(200)
    counts[[9, 30, 31, 120, 7]] = [5, 8, 8, 2, 2]
    drafter.fit_vocabulary(lambda: counts)
    assert drafter.vocabulary.tolist() == [7, 9, 30, 31]  # of the two labels with count 2, the lower id
    assert drafter.d2t.tolist() == [7, 8, 28, 28]  # offsets, not ids
    assert drafter.t2d.nonzero()[:, 0].tolist() == [7, 9, 30, 31]
    assert drafter.t2d.dtype == torch.bool
    head = target.model.get_output_embeddings().weight
    assert torch.equal(drafter.lm_head.weight, head[[7, 9, 30, 31]])


def test_a_draft_vocabulary_larger_than_the_tokenizers_is_refused(target):
    with pytest.raises(CheckpointError, match=r"draft_vocab_size must be 1\.\.257"):
        Eagle3Drafter.create(Eagle3Settings(draft_vocab_size=258), target=target, tokenizer=None)


@pytest.mark.parametrize("size", [None, 40])
def test_the_exported_folder_has_the_official_names_and_reads_back(target, tmp_path, size):
    drafter = eagle_drafter("eagle3", target, draft_vocab_size=size, draft="greedy", num_steps=2)
    drafter.fit_vocabulary(lambda: np.arange(257))
    folder = exported(drafter, target, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == NAMES | ({"d2t", "t2d"} if size else set())
    assert tensors["fc.weight"].shape == (32, 96)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["lm_head.weight"].shape == (size or 257, 32)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == (size or 257)
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["vocab_size"] == 257
    if size:
        assert tensors["d2t"].dtype == torch.int64
        assert tensors["t2d"].dtype == torch.bool
        assert torch.equal(torch.arange(size) + tensors["d2t"], tensors["t2d"].nonzero()[:, 0])
    again = read_drafter(folder, target, dtype="float64")
    assert isinstance(again, Eagle3Drafter)
    assert again.own == drafter.own
    batch, _ = packed(target, drafter, (9, 6), width=15)
    ours, theirs = drafter(batch), again(batch)
    assert set(ours.states_BTD) == set(theirs.states_BTD) == {1, 2}
    for depth in ours.states_BTD:
        assert torch.equal(ours.logits_BTV(depth), theirs.logits_BTV(depth))


def test_a_folder_with_a_tensor_too_many_too_few_or_of_another_shape_is_refused(target, tmp_path):
    folder = exported(eagle_drafter("eagle3", target, draft_vocab_size=40), target, tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.bias"] = torch.zeros(32)
    del tensors["norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(41, 32)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"3 tensors.*norm\.weight: missing.*fc\.bias: unknown.*\[41, 32\]"):
        read_drafter(folder, target)


def test_a_target_of_another_width_is_refused(target, tmp_path):
    folder = exported(eagle_drafter("eagle3", target), target, tmp_path)
    with pytest.raises(CheckpointError, match="hidden_size is 32, this target, tiny, has 48"):
        Eagle3Drafter.load(folder, eagle_target(hidden_size=48))


def exported(drafter: Any, target: Any, folder: Path) -> Path:
    """Export a drafter as a run does."""
    drafter.save(folder / "weights")
    about = About(drafter.kind, target.name, "", target.tokenizer_fingerprint, 257, 0)
    export_hf(folder / "weights", folder / "drafter", tokenizer=target.tokenizer, about=about, dtype="float64")
    return folder / "drafter"
