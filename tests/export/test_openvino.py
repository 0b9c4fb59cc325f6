"""OpenVINO's format: what OpenVINO would drop is refused, and its files are read back without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.export.convert import converted
from drafttrain.export.openvino_graph import read_graph
from tests.conftest import byte_tokenizer
from tests.export import folders


def test_eagle3_gets_the_blocks_whose_outputs_it_reads(source, target_config):
    made = converted("openvino", source("eagle3"), target_config)
    assert made.config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert made.config["hidden_layers_list"] == [0, 1, 2]
    assert "hidden_layers_list is [0, 1, 2]" in made.notes[0]
    assert not made.tensors["embed_tokens.weight"].any()
    assert "t2d" not in made.tensors
    assert torch.allclose(made.tensors["rotary_emb.inv_freq"], 10_000.0 ** -torch.arange(0, 1, 2 / 16))


def test_a_drafter_of_the_whole_vocabulary_gets_a_map_that_changes_nothing(source, target_config):
    made = converted("openvino", source("eagle3", draft_vocab_size=None), target_config)
    assert made.tensors["d2t"].shape == (257,)
    assert not made.tensors["d2t"].any()


def two_taps(tensors, config) -> None:
    config["eagle_aux_hidden_state_layer_ids"] = [1, 3]
    tensors["fc.weight"] = tensors["fc.weight"][:, : 2 * config["hidden_size"]]


def tap_at_the_embedding(tensors, config) -> None:
    config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2]


def narrow_target(tensors, config) -> None:
    config["target_hidden_size"] = config["hidden_size"] * 2
    tensors["fc.weight"] = tensors["fc.weight"].repeat(1, 2)


@pytest.mark.parametrize(
    ("settings", "fault", "named"),
    [
        ({"fc_norm": True}, None, "fc_norm is True: OpenVINO does not read it"),
        ({"norm_before_fc": True}, None, "norm_before_fc is True: OpenVINO does not read it"),
        ({"norm_before_residual": True}, None, "norm_before_residual is True: OpenVINO does not read it"),
        ({}, two_taps, r"\[1, 3\]: OpenVINO reads exactly 3 states"),
        ({}, tap_at_the_embedding, r"\[0, 1, 2\]: OpenVINO reads outputs of the target's blocks, 1\.\.3"),
        ({}, narrow_target, "target_hidden_size is 64, hidden_size 32"),
        ({}, folders.swap_taps, r"eagle_aux_hidden_state_layer_ids is \[2, 1, 3\]"),
        ({}, folders.add_fc_bias, r"fc\.bias: this layout has no such bias"),
        ({}, folders.shift_d2t, "d2t and t2d: name different tokens"),
        ({}, folders.drop_hidden_norm, r"midlayer\.hidden_norm\.weight: missing"),
        ({}, folders.truncate_down, r"midlayer\.mlp\.down_proj\.weight: shape"),
        ({}, folders.alter_rope_theta, "rope_theta is 500.0"),
    ],
)
def test_what_openvino_would_compute_differently_is_refused_by_name(settings, fault, named, source, target_config):
    folder = source("eagle3", **settings)
    if fault:
        folders.damage(folder, fault)
    with pytest.raises(CheckpointError, match=named):
        converted("openvino", folder, target_config)


@pytest.mark.parametrize("kind", ["medusa", "eagle", "kangaroo"])
def test_other_kinds_are_refused(kind, source, target_config):
    with pytest.raises(CheckpointError, match=f"openvino cannot hold drafter.kind {kind}"):
        converted("openvino", source(kind), target_config)


SIZES = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
OTHER_MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=1, n_head=2, n_positions=64)),
    "gemma3_text": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    ),
}


@pytest.mark.parametrize(("kind", "has"), [("gpt2", "none"), ("gemma3_text", "one for each kind of layer")])
def test_a_model_without_one_rotary_embedding_is_refused(kind, has, target_config, tmp_path):
    OTHER_MODELS[kind]().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"model_type is '{kind}': only models with .* this one has {has}"):
        converted("openvino", tmp_path, target_config)


def test_without_the_engine_nothing_is_written(source, target, monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "none"))
    folder = source("causal_lm")
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "openvino", "--target", target.name])
    assert done.exit_code == 1
    assert "drafttrain engines install openvino" in done.stderr
    assert not folder.with_name("drafter.openvino").exists()


CONSTANT = '<layer id="{id}" name="{name}" type="Const"><data element_type="f32" shape="{shape}" offset="{offset}" size="{size}"/></layer>'


@pytest.fixture
def graph(tmp_path) -> Path:
    """A graph of a matrix with its name, a norm and a bias without, and a number that is no weight."""
    constants = np.arange(16, dtype=np.float32)
    (tmp_path / "openvino_model.bin").write_bytes(constants.tobytes())
    layers = [
        CONSTANT.format(id=0, name="self.model.fc.weight", shape="2, 4", offset=0, size=32),
        CONSTANT.format(id=1, name="Constant_7", shape="1, 1, 4", offset=32, size=16),
        CONSTANT.format(id=2, name="Constant_8", shape="1, 1, 3", offset=48, size=12),
        CONSTANT.format(id=3, name="Constant_9", shape="1, 1, 1", offset=60, size=4),
        '<layer id="4" name="__module.model.norm/aten::mul/Multiply_1" type="Multiply"/>',
        '<layer id="5" name="__module.model.q_proj/aten::linear/Add" type="Add"/>',
    ]
    edges = [(1, 4), (2, 5), (3, 4)]
    (tmp_path / "openvino_model.xml").write_text(
        f"<net><layers>{''.join(layers)}</layers><edges>"
        + "".join(f'<edge from-layer="{a}" to-layer="{b}"/>' for a, b in edges)
        + '</edges><rt_info><hidden_layers_list value="0 2 4"/></rt_info></net>'
    )
    return tmp_path


def test_weights_are_read_by_the_names_of_their_modules(graph):
    notes, tensors = read_graph(graph)
    assert notes == {"hidden_layers_list": "0 2 4"}
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "model.fc.weight": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "model.norm.weight": [8, 9, 10, 11],
        "model.q_proj.bias": [12, 13, 14],
    }


def test_a_file_that_is_cut_short_is_named(graph):
    path = graph / "openvino_model.bin"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(
        CheckpointError, match=r"openvino_model\.bin: the weights cannot be read: model\.norm\.weight ends"
    ):
        read_graph(graph)
    (graph / "openvino_model.xml").write_text("<net>")
    with pytest.raises(CheckpointError, match="not an OpenVINO graph"):
        read_graph(graph)
