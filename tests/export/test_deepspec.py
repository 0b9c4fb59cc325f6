"""DSpark in DeepSpec's layout: names, shapes and fields as its readers define them, and the same drafter behind them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import check_exported, converted, export_as
from tests.export import folders


def readers_tensors(config: dict[str, Any], layers: int) -> dict[str, tuple[int, ...]]:
    """Return what DeepSpec's Qwen3DSparkModel defines, written down from its source."""
    vocab, width, inner, size = (config[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    rank, taps = config["markov_rank"], len(config["target_layer_ids"])
    found: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "fc.weight": (width, taps * width),
        "hidden_norm.weight": (width,),
        "norm.weight": (width,),
        "markov_head.markov_w1.weight": (vocab, rank),
        "markov_head.markov_w2.weight": (vocab, rank),
        "confidence_head.proj.weight": (1, width + rank),
        "confidence_head.proj.bias": (1,),
    }
    for number in range(layers):
        found |= {
            f"layers.{number}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, queries),
                "self_attn.q_norm": (size,),
                "self_attn.k_norm": (size,),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
            }.items()
        }
    return found


def test_the_folder_is_what_its_readers_define(source, target, target_config, tmp_path):
    folder = source("dspark")
    export_as("deepspec", folder, tmp_path / "out", target_config=target_config)
    check_exported("deepspec", folder, tmp_path / "out", target_config=target_config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == readers_tensors(config, layers=2)
    assert torch.equal(tensors["embed_tokens.weight"], target.model.get_input_embeddings().weight)
    assert torch.equal(tensors["lm_head.weight"], target.model.get_output_embeddings().weight)
    ours = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in ours.items())
    wanted = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "block_size": 3,
        "mask_token_id": 1,
        "target_layer_ids": [0, 2],
        "num_anchors": 512,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "tie_word_embeddings": False,
    }
    assert {key: config.get(key) for key in wanted} == wanted
    assert not [key for key in config if "drafttrain" in key or key in ("dflash_config", "sample_from_anchor")]


def test_every_name_is_in_the_source_of_vllms_class(source, target_config):
    """Where an installed vLLM has the class: each part of a tensor's name is one that its modules define."""
    engines = Path.home() / ".cache" / "drafttrain" / "engines"
    found = sorted(engines.glob("vllm-*/lib/python*/site-packages/vllm/model_executor/models/qwen3_dspark.py"))
    if not found:
        pytest.skip("no installed vLLM has qwen3_dspark.py")
    text = "".join(path.read_text() for path in (found[-1], found[-1].parent / "qwen3_dflash.py"))
    text += (found[-1].parent / "qwen3.py").read_text() + (found[-1].parent / "qwen2.py").read_text()
    defined = set(re.findall(r"self\.(\w+)(?::[^=\n]+)?\s*=", text)) | set(re.findall(r"[\"'.](\w+_proj)\b", text))
    files = converted("deepspec", source("dspark"), target_config)
    parts = {part for name in files.tensors for part in name.split(".")[:-1] if not part.isdigit()}
    assert {"markov_w1", "confidence_head", "hidden_norm"} <= parts
    assert parts - defined == set()
    assert "markov_w3" not in defined


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_from_anchor": False}, "sample_from_anchor is false"),
        ({"causal": True}, "causal is true"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(settings, message, source, target_config):
    with pytest.raises(CheckpointError, match=message):
        converted("deepspec", source("dspark", **settings), target_config)


@pytest.mark.parametrize("settings", [{"markov_head": "rnn"}, {"draft_vocab_size": 100}, {"confidence_head": False}])
def test_each_form_is_exported_whole(settings, source, target_config, tmp_path):
    folder = source("dspark", **settings)
    export_as("deepspec", folder, tmp_path / "out", target_config=target_config)
    check_exported("deepspec", folder, tmp_path / "out", target_config=target_config)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert set(theirs) - set(ours) == {"embed_tokens.weight"} | (
        set() if "lm_head.weight" in ours else {"lm_head.weight"}
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda tensors, _: tensors.pop("markov_head.markov_w1.weight"), r"markov_head\.markov_w1\.weight: missing"),
        (lambda tensors, _: tensors.pop("lm_head.weight"), r"lm_head\.weight: missing"),
        (lambda _, config: config.pop("markov_rank"), "markov_rank is missing"),
    ],
)
def test_a_damaged_export_is_named(fault, message, source, target_config, tmp_path):
    folder = source("dspark")
    export_as("deepspec", folder, tmp_path / "out", target_config=target_config)
    folders.damage(tmp_path / "out", fault)
    with pytest.raises(CheckpointError, match=message):
        check_exported("deepspec", folder, tmp_path / "out", target_config=target_config)
