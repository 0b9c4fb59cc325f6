"""A field of a foreign config.json is refused if and only if it has an effect that drafttrain's layer does not support."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.importers import Imported
from drafttrain.importers.convert import import_folder
from drafttrain.target_model import Target, TargetSettings
from tests.importers import given

LAYER = "transformer_layer_config"


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


def imported(layout: str, target: Target, folder: Any, more: dict[str, Any], **tensors: Any) -> Imported:
    """Import a folder whose configuration of the layer has further fields."""
    if layout == "speculators":
        config = given.speculators_config(target.name)
        config[LAYER] = {**config[LAYER], **more}
        held = given.eagle3_tensors("layers.0.")
    elif layout == "eagle":
        config, held = {"architectures": ["LlamaForCausalLM"], **given.LLAMA, **more}, given.eagle_tensors()
    else:
        config, held = given.eagle3_config(**more), given.eagle3_tensors()
    given.write(folder / "theirs", held | tensors, config)
    return import_folder(folder / "theirs", folder / "out", target=target.name)


IDLE: list[dict[str, Any]] = [
    {"sliding_window": 16, "use_sliding_window": False},
    {"sliding_window": 16, "layer_types": ["full_attention"]},
    {"sliding_window": 16, "layer_types": ["full_attention"], "use_sliding_window": True},
    {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    {"sliding_window": 16},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 28},
    {"sliding_window": 256, "use_sliding_window": True},
    {"sliding_window": None, "layer_types": ["sliding_attention"]},
    {"decoder_sparse_step": 1, "num_experts": 8, "moe_intermediate_size": 16},
    {"target_model_type": "gemma3_text"},
    {"max_sequence_length": 4096},
    {"pretraining_tp": 4},
    {"text_max_position_embeddings": 64},
    {"quantization_config": None},
    {"original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
    {"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3], "some_new_field": 1}},
    {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}},
]


@pytest.mark.parametrize("layout", ["eagle3", "speculators", "eagle"])
@pytest.mark.parametrize("more", IDLE, ids=str)
def test_a_field_without_effect_changes_nothing(layout, more, target, tmp_path):
    made = imported(layout, target, tmp_path / "with", more)
    plain = imported(layout, target, tmp_path / "without", {})
    assert made.files.config == plain.files.config
    assert given.same(given.held(tmp_path / "with" / "out"), given.held(tmp_path / "without" / "out"))


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "mixtral", "llama4_text"])
@pytest.mark.parametrize("layout", ["eagle3", "eagle"])
def test_model_type_has_no_effect_if_the_architecture_names_the_layer(layout, model_type, target, tmp_path):
    assert imported(layout, target, tmp_path, {"model_type": model_type}).files.config["model_type"] == "llama"


EFFECTS: list[tuple[dict[str, Any], str]] = [
    (
        {"sliding_window": 16, "layer_types": ["sliding_attention"]},
        "layer_types enables it: the layer would attend",
    ),
    (
        {"sliding_window": 16, "layer_types": ["sliding_attention"], "use_sliding_window": False},
        "layer_types enables it",
    ),
    ({"sliding_window": 16, "use_sliding_window": True}, "use_sliding_window enables it"),
    ({"layer_types": ["linear_attention"]}, "the layer would have another kind of attention"),
    ({"layer_types": "full_attention"}, "layer_types must be a list of names"),
    ({"attention_bias": True}, "projections would have biases"),
    ({"mlp_bias": True}, "the feed-forward block would have biases"),
    ({"partial_rotary_factor": 0.5}, "only part of each head would be rotated"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        "part of each head",
    ),
    ({"hidden_act": "gelu"}, "the layer would have another activation"),
    ({"is_causal": False}, "would look ahead"),
    ({"logit_scale": 0.5}, "logits would be scaled"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights are not supported"),
]


@pytest.mark.parametrize("layout", ["eagle3", "speculators", "eagle"])
@pytest.mark.parametrize(("more", "effect"), EFFECTS, ids=str)
def test_a_field_with_an_effect_is_refused_in_one_line_that_names_it(layout, more, effect, target, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        imported(layout, target, tmp_path, more)
    first, *rest = str(caught.value).splitlines()
    assert first.endswith("1 problem")
    assert len(rest) == 1
    assert effect in rest[0]


def added(prefix: str, *names: str) -> dict[str, torch.Tensor]:
    return {prefix + name: torch.ones(2) for name in names}


# (fields, tensors by the layer's prefix, what its one line contains)
FORMS: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"attention_bias": True}, ("self_attn.q_proj.bias", "self_attn.o_proj.bias"), "projections would have biases"),
    (
        {},
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias"),
        "k_proj.bias and 1 more: the attention's projections would have",
    ),
    ({"mlp_bias": True}, ("mlp.up_proj.bias",), "the feed-forward block would have biases"),
    ({}, ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), "queries and keys would be normed in each head"),
    (
        {},
        tuple(f"mlp.experts.{k}.up.weight" for k in range(40)),
        "and 39 more: the feed-forward block would be a mixture",
    ),
]


@pytest.mark.parametrize("layout", ["eagle3", "speculators", "eagle"])
@pytest.mark.parametrize(("more", "names", "effect"), FORMS)
def test_a_layer_of_another_form_is_one_line_that_names_the_form(layout, more, names, effect, target, tmp_path):
    prefix = "midlayer." if layout == "eagle3" else "layers.0."
    with pytest.raises(CheckpointError) as caught:
        imported(layout, target, tmp_path, more, **added(prefix, *names))
    (line,) = str(caught.value).splitlines()[1:]
    assert effect in line


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 3}, {}], ids=str)
def test_further_layers_are_one_line(fields, target, tmp_path):
    more = {f"layers.{k}.{name}": torch.ones(2) for k in (1, 2) for name in given.layer("", reads=32)}
    with pytest.raises(CheckpointError) as caught:
        imported("speculators", target, tmp_path, fields, **more)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.endswith("further layers are not supported")


def test_a_layer_of_qwen3_is_refused_by_its_effect(target, tmp_path):
    norms = added("layers.0.self_attn.", "q_norm.weight", "k_norm.weight")
    with pytest.raises(CheckpointError) as caught:
        imported("speculators", target, tmp_path, {"model_type": "qwen3"}, **norms)
    (line,) = str(caught.value).splitlines()[1:]
    assert "model_type is 'qwen3', must be 'llama': queries and keys would be normed in each head" in line


def test_unknown_fields_are_named_in_one_note(target, tmp_path):
    made = imported("eagle3", target, tmp_path, {"some_new_field": 1, "another": {"a": [1]}})
    assert "config.json: unknown fields, not read: some_new_field, another" in made.notes


def test_missing_positions_are_the_targets(target, tmp_path):
    """vLLM stops drafting at the drafter's positions."""
    made = imported("eagle3", target, tmp_path, {"max_position_embeddings": None})
    assert made.files.config["max_position_embeddings"] == 512
    assert any("max_position_embeddings is missing: set to 512, the target's" in note for note in made.notes)


@pytest.mark.parametrize(
    ("value", "words"), [(True, "fed back after the final norm"), (False, "fed back before the final norm")]
)
def test_the_import_reports_what_specforge_means_by_norm_output(value, words, target, tmp_path):
    made = imported("eagle3", target, tmp_path, {"norm_output": value})
    (note,) = (note for note in made.notes if "norm_output" in note)
    assert words in note
    assert "as in vLLM 0.32.0 and SGLang 0.5.23. In SpecForge 0.2.0 it means" in note


def test_the_scale_of_the_targets_own_head_is_read(save_llama, tmp_path):
    """EAGLE-1 reads the target's head, which scales as the target does; another scale is another drafter."""
    folder = save_llama(num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 4.0}))
    for scale, name in ((0.25, "same"), (0.5, "other")):
        layer = {"architectures": ["LlamaForCausalLM"], **given.LLAMA, "logit_scale": scale}
        given.write(tmp_path / name, given.eagle_tensors(), layer)
    import_folder(tmp_path / "same", tmp_path / "out", target=str(folder))
    with pytest.raises(CheckpointError, match=r"logit_scale is 0\.5"):
        import_folder(tmp_path / "other", tmp_path / "out", target=str(folder))


def test_the_draft_length_of_a_speculators_folder_is_kept(target, tmp_path):
    config = given.speculators_config(target.name)
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 7
    given.write(tmp_path / "theirs", given.eagle3_tensors("layers.0."), config)
    made = import_folder(tmp_path / "theirs", tmp_path / "out")
    assert made.files.config["drafttrain"]["num_steps"] == 7


# (tensor that is added or field, what its one line contains)
KINDS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"architectures": ["DFlash2BeamDraftModel"]}, "names DFlash2BeamDraftModel: a DFlash2 drafter"),
    ({}, {"architectures": ["DominoDraftModel"]}, "names DominoDraftModel: a Domino drafter"),
    ({"markov_head.markov_w1.weight": torch.zeros(2, 2)}, {}, r"markov_w1.weight: a DSpark drafter"),
    ({"midlayer.mlp.up_proj.qweight": torch.zeros(2, 2)}, {}, "qweight: quantized weights"),
    ({"midlayer.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}, {}, "a LoRA adapter"),
    ({}, {"architectures": ["MLPSpeculatorPreTrainedModel"]}, "an MLP speculator"),
]


@pytest.mark.parametrize(("tensors", "fields", "what"), KINDS)
def test_an_unsupported_kind_is_one_line_that_names_it(tensors, fields, what, target, tmp_path):
    folder = given.write(tmp_path / "theirs", given.eagle3_tensors() | tensors, given.eagle3_config(**fields))
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder, tmp_path / "out", target=target.name)
    (line,) = str(caught.value).splitlines()
    assert what in line
    assert line.endswith("which is not supported yet")


def test_many_tensors_of_one_pattern_are_one_line(target, tmp_path):
    more = {f"midlayer.odd.{k}.{part}.weight": torch.zeros(2, 2) for k in range(40) for part in ("up", "down")}
    folder = given.write(tmp_path / "theirs", given.eagle3_tensors() | more, given.eagle3_config())
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder, tmp_path / "out", target=target.name)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "midlayer.odd.*.down.weight: this layout has no such tensor (40 of them)" in lines[1]


def test_heads_are_as_many_as_the_file_holds(target, tmp_path):
    """The authors' published configurations have 2 where the file has 5, and so has their own loader."""
    config = given.medusa_config(target.name, heads=2)
    given.write(tmp_path / "theirs", given.medusa_tensors(heads=5), config, file="medusa_lm_head.pt")
    made = import_folder(tmp_path / "theirs", tmp_path / "out")
    assert made.files.config["num_heads"] == 5
    assert "config.json: medusa_num_heads is 2, medusa_lm_head.pt holds 5 heads: all are imported" in made.notes
    assert given.held(tmp_path / "out")["lm_heads.4.weight"].shape == (257, 32)


@pytest.mark.parametrize("prefix", ["", "medusa_head.", "model.medusa_heads."])
def test_blocks_without_output_matrices_get_the_targets_head(prefix, target, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in given.medusa_tensors().items() if "linear" in name}
    config = given.medusa_config(target.name) | {"version": "2"}
    import_folder(given.write(tmp_path / "theirs", tensors, config), tmp_path / "out")
    drafter: Any = read_drafter(tmp_path / "out", target)
    state_ND = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states_ND = drafter.states(state_ND, 2)
        assert torch.equal(drafter.head(states_ND, 2), target.model.get_output_embeddings()(states_ND))
        block = [
            given.medusa_tensors()[f"1.{layer}.linear.{part}"] for layer in range(2) for part in ("weight", "bias")
        ]
        for weight_DD, bias_D in (block[:2], block[2:]):
            state_ND = state_ND + torch.nn.functional.silu(state_ND @ weight_DD.T + bias_D)
    assert torch.allclose(states_ND, state_ND, atol=1e-5)


def test_heads_inside_a_whole_model_are_one_line(target, tmp_path):
    heads = {f"medusa_head.{name}": tensor for name, tensor in given.medusa_tensors().items()}
    model = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    folder = given.write(tmp_path / "theirs", model | heads, given.medusa_config(target.name))
    with pytest.raises(CheckpointError, match=r"holds \d+ tensors of a whole model besides the heads") as caught:
        import_folder(folder, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 2
