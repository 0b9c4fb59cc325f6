"""DSpark in the speculators format: every parameter that the library's class defines, with its shape, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file

from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import check_exported, converted, export_as
from tests.export import folders
from tests.export.test_deepspec import readers_tensors

ROWS = 100
"""Of a drafter with a vocabulary of its own."""


def librarys_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what DSparkDraftModel of speculators 0.9.0 defines, but the target's embedding, norm and head.

    These names and shapes were compared with the class itself for each form below, built from the exported config.json.
    """
    layer, rank = config["transformer_layer_config"], config["markov_rank"]
    flat = {**layer, **config, "target_layer_ids": config["aux_hidden_state_layer_ids"]}
    width, rows = layer["hidden_size"], config["draft_vocab_size"]
    found = readers_tensors(flat, layers=layer["num_hidden_layers"])
    del found["embed_tokens.weight"]
    found |= {"lm_head.weight": (rows, width), "markov_head.markov_w2.weight": (rows, rank)}
    if rows != layer["vocab_size"]:
        found |= {"d2t": (rows,), "t2d": (layer["vocab_size"],)}
    if config["markov_head_type"] == "gated":
        found |= {"markov_head.gate_proj.weight": (rank, width + rank), "markov_head.gate_proj.bias": (rank,)}
    if config["markov_head_type"] == "rnn":
        found |= {
            "markov_head.joint_proj.weight": (3 * rank, 2 * rank + width),
            "markov_head.joint_proj.bias": (3 * rank,),
        }
    if not config["enable_confidence_head"]:
        del found["confidence_head.proj.weight"], found["confidence_head.proj.bias"]
    elif not config["confidence_head_with_markov"]:
        found["confidence_head.proj.weight"] = (1, width)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"markov_head": "gated"},
        {"markov_head": "rnn"},
        {"confidence_head": False},
        {"confidence_with_markov": False},
        {"draft_vocab_size": ROWS},
        {"sample_from_anchor": False},
    ],
    ids=str,
)
def test_every_form_has_the_parameters_of_the_librarys_class(settings, source, target_config, tmp_path):
    folder, out = source("dspark", **settings), tmp_path / "out"
    export_as("speculators", folder, out, target_config=target_config)
    check_exported("speculators", folder, out, target_config=target_config)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == librarys_tensors(config)
    anchor = settings.get("sample_from_anchor", True)
    wanted = {
        "architectures": ["DSparkDraftModel"],
        "speculators_model_type": "dspark",
        "block_size": 3,
        "mask_token_id": 1,
        "aux_hidden_state_layer_ids": [1, 3],
        "draft_vocab_size": settings.get("draft_vocab_size", 257),
        "sample_from_anchor": anchor,
        "sliding_window_non_causal": True,
        "markov_rank": 6,
    }
    assert {key: config[key] for key in wanted} == wanted
    # The root's slot is a draft token more.
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == (3 if anchor else 2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda tensors, _: tensors.pop("markov_head.markov_w1.weight"), r"markov_head\.markov_w1\.weight: missing"),
        (lambda tensors, _: tensors.pop("lm_head.weight"), r"lm_head\.weight: missing"),
        (lambda _, config: config.pop("sample_from_anchor"), "sample_from_anchor is missing"),
        (
            lambda _, config: config.update(sliding_window_non_causal=False),
            "sliding_window_non_causal is False, must be",
        ),
        (lambda _, config: config.update(markov_head_type="gated"), "markov_head_type is 'gated', must be 'vanilla'"),
    ],
)
def test_a_damaged_export_is_named(fault, message, source, target_config, tmp_path):
    folder, out = source("dspark"), tmp_path / "out"
    export_as("speculators", folder, out, target_config=target_config)
    folders.damage(out, fault)
    with pytest.raises(CheckpointError, match=message):
        check_exported("speculators", folder, out, target_config=target_config)


def test_a_causal_block_is_refused(source, target_config):
    with pytest.raises(CheckpointError, match="causal is true: this format has no field for it"):
        converted("speculators", source("dspark", causal=True), target_config)
