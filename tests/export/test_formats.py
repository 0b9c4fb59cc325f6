"""Formats: the same tensors under the loaders' names; what a loader would silently drop is an error that names it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.export import exporters
from drafttrain.export.convert import check_exported, converted, export_as, exporter_of
from drafttrain.export.target_weights import scales_embedding
from tests.conftest import byte_tokenizer
from tests.export import folders

KINDS = ("causal_lm", "medusa", "eagle", "eagle3", "p_eagle", "dflash")


@pytest.mark.parametrize("kind", KINDS)
def test_a_vllm_folder_holds_the_same_tensors_and_nothing_of_ours(kind, source, tmp_path, target_config):
    folder = source(kind)
    export_as("vllm", folder, tmp_path / "out", target_config=target_config)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [key for key in json.loads((tmp_path / "out" / "config.json").read_text()) if "drafttrain" in key]
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["vllm", "speculators"])
@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_a_block_drafter_of_a_target_that_scales_its_embedding_is_refused_for_vllm(
    kind, name, source, tmp_path, target_config
):
    """vLLM shares the plain rows; a layer of EAGLE-3 norms them, so the factor does not matter to it."""
    scaled = {**target_config, "model_type": "gemma3_text", "layer_types": ["full_attention"] * 4}
    assert [scales_embedding(one) for one in (target_config, scaled)] == [False, True]
    folder = source(kind)
    if kind == "dflash":
        with pytest.raises(CheckpointError, match=r"the target \(gemma3_text\) multiplies its embeddings"):
            export_as(name, folder, tmp_path / "out", target_config=scaled)
    else:
        export_as(name, folder, tmp_path / "out", target_config=scaled)
    # The control: a target that reads plain rows.
    export_as(name, folder, tmp_path / "plain", target_config=target_config)


@pytest.mark.parametrize(("kind", "scales"), [("qwen2_5_vl_text", False), ("gemma3_text", True), ("of_nobody", False)])
def test_the_language_model_of_a_multimodal_target_may_have_no_class_with_a_head(kind, scales):
    sizes = {
        "num_hidden_layers": 1,
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
    }
    text = {"model_type": kind, **sizes, "num_key_value_heads": 2}
    assert scales_embedding({"model_type": "whole", "text_config": text}) == scales


@pytest.mark.parametrize(
    "settings",
    [{}, {"draft_vocab_size": None}, {"norm_before_residual": True, "fc_norm": True}, {"norm_before_fc": True}],
)
def test_speculators_writes_every_field_that_it_has_a_default_for_and_the_embedding(
    settings, source, tmp_path, target, target_config
):
    folder = source("eagle3", **settings)
    export_as("speculators", folder, tmp_path / "out", target_config=target_config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ours = json.loads((folder / "config.json").read_text())
    assert "model_type" not in config
    assert {key: config[key] for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")} == {
        key: settings.get(key, False) for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    }
    assert config["eagle_aux_hidden_state_layer_ids"] == ours["eagle_aux_hidden_state_layer_ids"]
    layer = config["transformer_layer_config"]
    assert {key: layer[key] for key in ("rope_parameters", "head_dim", "model_type")} == {
        key: ours[key] for key in ("rope_parameters", "head_dim", "model_type")
    }
    assert config["speculators_config"]["verifier"]["name_or_path"] == "the/target"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "layers.0.hidden_norm.weight" in tensors
    assert torch.equal(tensors["embed_tokens.weight"], target.model.get_input_embeddings().weight)
    assert not [name for name in tensors if name.startswith("midlayer.")]


def test_speculators_holds_p_eagle_under_its_names(source, tmp_path, target_config):
    folder = source("p_eagle")
    export_as("speculators", folder, tmp_path / "out", target_config=target_config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["speculators_model_type"], config["architectures"]) == ("peagle", ["PEagleSpeculator"])
    assert (config["mask_token_id"], config["norm_before_residual"]) == (1, False)
    assert config["transformer_layer_config"]["num_hidden_layers"] == 2
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 3
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {"layers.0.hidden_norm.weight", "layers.1.input_layernorm.weight", "mask_hidden"} < tensors.keys()


def test_norms_that_vllm_drops_of_p_eagle_in_the_speculators_format_are_refused(source, tmp_path, target_config):
    folder = source("p_eagle", fc_norm=True)
    with pytest.raises(CheckpointError, match=r"fc_norm is true: vLLM 0\.32\.0 drops"):
        export_as("speculators", folder, tmp_path / "out", target_config=target_config)
    export_as("vllm", folder, tmp_path / "vllm", target_config=target_config)
    assert "fc_norm.0.weight" in load_file(tmp_path / "vllm" / "model.safetensors")


def test_a_p_eagle_folder_without_its_mask_vector_is_named(source, tmp_path, target_config):
    folder, out = source("p_eagle"), tmp_path / "out"
    export_as("vllm", folder, out, target_config=target_config)
    folders.damage(out, lambda tensors, _: tensors.pop("mask_hidden"))
    held = exporter_of("vllm").problems(exporter_of("vllm").read(out), target_config)
    assert held == ["mask_hidden: missing: loaders silently leave it at its initial values"]


def test_a_speculators_folder_without_an_embedding_is_named(source, tmp_path, target_config):
    folder, out = source("eagle3"), tmp_path / "out"
    export_as("speculators", folder, out, target_config=target_config)
    folders.damage(out, lambda tensors, _: tensors.pop("embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: missing"):
        check_exported("speculators", folder, out, target_config=target_config)
    held = exporter_of("speculators").problems(exporter_of("speculators").read(out), target_config)
    assert held == ["embed_tokens.weight: missing: speculators computes with uninitialized memory instead"]


def test_the_embedding_of_a_speculators_folder_has_the_type_of_its_weights(source, tmp_path, target, target_config):
    folder = source("eagle3")
    folders.damage(folder, lambda t, _: t.update({n: v.bfloat16() for n, v in t.items() if v.is_floating_point()}))
    export_as("speculators", folder, tmp_path / "out", target_config=target_config)
    held = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(held, target.model.get_input_embeddings().weight.bfloat16())


def test_speculators_takes_one_norm_before_fc_and_drafts_as_far_as_training_did(source, target_config):
    folder = source("eagle3", num_steps=4)
    made = converted("speculators", folder, target_config)
    assert made.config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    folders.damage(folder, lambda t, c: c.update(fc_norm=True, norm_before_fc=True))
    with pytest.raises(CheckpointError, match="norm_before_fc and fc_norm are both true: speculators"):
        converted("speculators", folder, target_config)


@pytest.mark.parametrize(
    ("kind", "format"), [("kangaroo", "vllm"), ("medusa", "speculators"), ("eagle", "speculators")]
)
def test_a_kind_that_a_format_cannot_hold_is_refused_with_the_formats_that_can(kind, format, source, target_config):
    able = [name for name in exporters.names() if kind in exporter_of(name).reads]
    with pytest.raises(CheckpointError, match=f"{format} cannot hold drafter.kind {kind}") as caught:
        converted(format, source(kind), target_config)
    assert all(name in str(caught.value) for name in able)


# What a loader reads of a folder that somebody else made or changed: (kind, damage, what the message names).
FAULTS = [
    ("eagle3", folders.swap_taps, r"eagle_aux_hidden_state_layer_ids is \[2, 1, 3\]"),
    ("eagle3", folders.shift_d2t, "d2t and t2d: name different tokens"),
    ("eagle3", folders.drop_d2t, "d2t: missing"),
    ("eagle3", folders.drop_hidden_norm, r"midlayer\.hidden_norm\.weight: missing"),
    ("eagle3", folders.alter_rope_theta, "rope_theta is 500.0, rope_parameters.rope_theta 10000.0"),
    ("eagle3", folders.alter_scaling, r"rope_scaling\.factor is 8\.0, rope_parameters\.factor 2\.0"),
    ("eagle3", folders.truncate_down, r"midlayer\.mlp\.down_proj\.weight: shape \[32, 63\], must be \[32, 64\]"),
    ("eagle3", folders.add_fc_bias, r"fc\.bias: this layout has no such bias"),
    ("eagle", folders.add_fc_bias, r"fc\.bias: 32 of 32 values are not zero: vLLM 0\.32\.0 silently drops them"),
    ("eagle", folders.alter_rope_theta, "rope_theta is 500.0"),
    ("medusa", folders.forget_biases, "medusa_fc_bias is not true: vLLM silently drops the biases"),
    ("medusa", folders.name_attention_heads, "num_attention_heads: loaders mistake it for num_heads"),
    ("causal_lm", folders.truncate_down, r"down_proj\.weight: shape"),
]


@pytest.mark.parametrize("shared", [False, True])
def test_for_vllm_heads_over_a_part_of_the_vocabulary_have_all_rows_and_draft_the_same(shared, source, target_config):
    folder = source("medusa", draft_vocab_size=100, shared_head=shared)
    held, made = load_file(folder / "model.safetensors"), converted("vllm", folder, target_config)
    ids_R = held["token_map"]
    states_ND = torch.randn(500, 32)
    for head in range(1 if shared else 3):
        rows_RD, rows_VD = held[f"lm_heads.{head}.weight"], made.tensors[f"lm_heads.{head}.weight"]
        assert rows_VD.shape == (257, 32)
        assert torch.equal((states_ND @ rows_VD.T).argmax(-1), ids_R[(states_ND @ rows_RD.T).argmax(-1)])
    assert "token_map" not in made.tensors
    assert "truncated_vocab_size" not in made.config
    assert "cannot load token_map" in made.notes[0]
    # The control: rows of zeros win wherever all logits are negative.
    zeros_VD = torch.zeros(257, 32).index_copy(0, ids_R, held["lm_heads.0.weight"] - 1)
    assert not torch.isin((states_ND @ zeros_VD.T).argmax(-1), ids_R).all()


@pytest.mark.parametrize(("kind", "fault", "named"), FAULTS)
def test_a_folder_that_vllm_would_misread_is_not_exported(kind, fault, named, source, target_config):
    folder = source(kind)
    converted("vllm", folder, target_config)
    folders.damage(folder, fault)
    with pytest.raises(CheckpointError, match=named):
        converted("vllm", folder, target_config)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (folders.swap_columns, r"fc\.weight: \d+ of 3072 values differ"),
        (folders.shift_d2t, "d2t: 100 of 100 values differ"),
        (folders.drop_hidden_norm, r"midlayer\.hidden_norm\.weight: missing"),
        (folders.alter_rope_everywhere, r"rope_parameters\.rope_theta is 500\.0, must be 10000\.0"),
        (folders.truncate_down, r"midlayer\.mlp\.down_proj\.weight: shape"),
        (folders.add_fc_bias, r"fc\.bias: this tensor must not be there"),
    ],
)
def test_a_changed_export_differs_from_its_source(fault, named, source, tmp_path, target_config):
    folder, out = source("eagle3"), tmp_path / "out"
    export_as("vllm", folder, out, target_config=target_config)
    check_exported("vllm", folder, out, target_config=target_config)
    folders.damage(out, fault)
    with pytest.raises(CheckpointError, match=named):
        check_exported("vllm", folder, out, target_config=target_config)


def test_a_truncated_file_is_named(source, tmp_path, target_config):
    folder, out = source("eagle3"), tmp_path / "out"
    export_as("vllm", folder, out, target_config=target_config)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the weights cannot be read"):
        check_exported("vllm", folder, out, target_config=target_config)


def test_weights_in_several_files_become_one_without_their_index(source, tmp_path, target_config):
    """vLLM looks for the files that an index names, and refuses a folder that lacks one."""
    folder = source("causal_lm")
    tensors = load_file(folder / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert (folder / "model.safetensors.index.json").exists()
    export_as("vllm", folder, tmp_path / "out", target_config=target_config)
    assert {path.name for path in (tmp_path / "out").glob("*safetensors*")} == {"model.safetensors"}
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensors[name]) for name in held)


def test_experts_have_the_names_of_files(target_config, tmp_path):
    sizes = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    made = converted("vllm", tmp_path, target_config)
    assert made.tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"].shape == (32, 24)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.weight: missing"):
        converted("vllm", tmp_path, target_config)


TWO, FOUR = {"taps": [1, 3], "fc_norm": True}, {"taps": [0, 1, 2, 3], "norm_before_fc": True}


@pytest.mark.parametrize("format", ["hf", "vllm", "speculators"])
@pytest.mark.parametrize("settings", [TWO, FOUR], ids=["two", "four"])
def test_any_number_of_taps_is_written_with_the_field_that_engines_read(format, settings, source, target_config):
    made = converted(format, source("eagle3", **settings), target_config)
    fields = made.config.get("transformer_layer_config", made.config)
    assert fields["num_aux_hidden_states"] == len(settings["taps"])
    assert made.config["eagle_aux_hidden_state_layer_ids"] == settings["taps"]


def test_sglang_reads_any_number_of_taps_but_the_embedding(source, target_config):
    made = converted("sglang", source("eagle3", **TWO), target_config)
    assert made.config["num_aux_hidden_states"] == 2
    assert made.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2]


@pytest.mark.parametrize("format", ["vllm", "speculators"])
@pytest.mark.parametrize(("settings", "exported"), [({}, True), (TWO, False)], ids=["three", "two"])
def test_without_the_number_of_taps_only_three_are_exported(format, settings, exported, source, target_config):
    folder = folders.damage(source("eagle3", **settings), folders.drop_number_of_taps)
    if exported:
        converted(format, folder, target_config)
        return
    with pytest.raises(CheckpointError, match="num_aux_hidden_states is None, must be 2"):
        converted(format, folder, target_config)


def test_sglang_has_no_state_before_the_first_block(source, target_config):
    folder = source("eagle3", taps=[0, 1, 3])
    converted("vllm", folder, target_config)
    with pytest.raises(CheckpointError, match=r"\[0, 1, 3\]: SGLang reads outputs of blocks"):
        converted("sglang", folder, target_config)


@pytest.mark.parametrize("settings", [{"fc_norm": True}, {"norm_output": True}, {"norm_before_fc": True}])
def test_sglang_has_the_variants_of_eagle3_but_one(settings, source, target_config):
    made = converted("sglang", source("eagle3", **settings), target_config)
    assert made.config | settings == made.config


def test_sglang_has_no_norm_before_the_residual(source, target_config):
    with pytest.raises(CheckpointError, match=r"norm_before_residual is true: SGLang 0\.5\.23 has no such variant"):
        converted("sglang", source("eagle3", norm_before_residual=True), target_config)


@pytest.mark.parametrize("kind", ["causal_lm", "eagle", "eagle3"])
def test_the_drafter_has_the_targets_positions(kind, source, target_config):
    """Engines draft no further than the drafter's own positions."""
    assert target_config["max_position_embeddings"] == 512
    assert converted("vllm", source(kind), target_config).config["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("fields", "scale"), [({"logits_scaling": 4.0}, 0.25), ({"logit_scale": 0.5}, 0.5), ({}, None)]
)
@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_vllm_finds_the_targets_scale_of_logits_in_the_drafter(kind, fields, scale, source, target_config):
    made = converted("vllm", source(kind), target_config | fields)
    assert made.config.get("logit_scale") == scale


def test_engines_get_the_soft_cap_of_the_target_or_a_note_reports_that_they_cannot(source, target_config):
    capped = target_config | {"final_logit_softcapping": 30.0}
    folder = source("eagle")
    assert converted("sglang", folder, capped).config["final_logit_softcapping"] == 30
    (note,) = converted("vllm", folder, capped).notes
    assert "soft cap of 30 on logits cannot be applied by vLLM 0.32.0" in note


def test_a_drafter_for_another_vocabulary_is_refused(source, target_config):
    with pytest.raises(CheckpointError, match="vocab_size is 257, the target's is 300"):
        converted("vllm", source("eagle"), target_config | {"vocab_size": 300})


@pytest.mark.parametrize("kind", KINDS)
def test_the_damages_change_what_the_drafter_computes(kind, source, target):
    """A control: without a damage every kind is read back; its tensors are none that could be left out unseen."""
    drafter = read_drafter(source(kind), target)
    assert all(not torch.equal(p, torch.ones_like(p)) for name, p in drafter.named_parameters() if "model." not in name)
