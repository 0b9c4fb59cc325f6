"""An importer names all that it does not support at once: file, key and allowed values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.importers.convert import converted, import_folder, layout_of
from drafttrain.importers.eagle3 import offsets
from drafttrain.importers.reading import read_given
from drafttrain.importers.target import TargetFiles
from drafttrain.target_model import Target, TargetSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.importers import given


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


def embedding(target: Target) -> Tensor:
    return target.model.get_input_embeddings().weight.detach().clone()


def move(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


# (layout, damage of (tensors, config, target), what the message names)
FAULTS: list[tuple[str, Any, list[str]]] = [
    (
        "eagle3",
        lambda t, c, _: t.update({"midlayer.self_attn.q_proj.bias": torch.zeros(32)}),
        [r"model\.safetensors: midlayer\.self_attn\.q_proj\.bias: the attention's projections would have biases"],
    ),
    (
        "eagle3",
        lambda t, c, _: t.update({"midlayer.odd.weight": torch.zeros(32)}),
        [r"model\.safetensors: midlayer\.odd\.weight: this layout has no such tensor", "allowed with this"],
    ),
    (
        "eagle3",
        lambda t, c, _: move(t, "midlayer.hidden_norm.weight", "midlayer.hiden_norm.weight"),
        [
            r"midlayer\.hidden_norm\.weight: missing, must be of shape \[32\]",
            r"Did you mean midlayer\.hidden_norm\.weight\?",
        ],
    ),
    (
        "eagle3",
        lambda t, c, _: t.update({"layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}),
        [r"midlayer\.mlp\.up_proj\.weight: is the same tensor as layers\.0\.mlp\.up_proj\.weight: remove one of them"],
    ),
    (
        "eagle3",
        lambda t, c, _: t.update({"fc.weight": t["fc.weight"][:, :64].contiguous()}),
        [r"fc\.weight: shape \[32, 64\], must be \[32, 96\]"],
    ),
    ("eagle3", lambda t, c, _: t.update({"norm.weight": torch.ones(32).long()}), [r"norm\.weight: is torch\.int64"]),
    ("eagle3", lambda t, c, _: t.update({"d2t": t["d2t"] + 1}), ["d2t and t2d: name different tokens|d2t: gives ids"]),
    ("eagle3", lambda t, c, _: t.pop("d2t"), [r"d2t: missing, must be of shape \[100\]"]),
    ("eagle3", lambda t, c, _: t.update({"d2t": t["d2t"].float()}), [r"d2t: is torch\.float32, must be int64"]),
    ("eagle3", lambda t, c, _: t.update({"t2d": t["t2d"].long() * 5}), ["t2d: must be true"]),
    (
        "eagle3",
        lambda t, c, _: c.update(fc_nrom=True),
        [r"config\.json: fc_nrom is True: unknown field. Did you mean fc_norm\?"],
    ),
    ("eagle3", lambda t, c, _: c.update(hidden_act="gelu"), ["hidden_act is 'gelu', must be 'silu' or None"]),
    ("eagle3", lambda t, c, _: c.update(num_hidden_layers=2), ["num_hidden_layers is 2, must be 1"]),
    (
        "eagle3",
        lambda t, c, _: c.update(norm_before_fc=True),
        [r"input_norm\.weight: missing, must be of shape \[96\]"],
    ),
    (
        "eagle3",
        lambda t, c, _: c.update(tie_word_embeddings=True) or t.pop("lm_head.weight"),
        [r"there is no lm_head\.weight"],
    ),
    (
        "eagle3",
        lambda t, c, _: c.update(eagle_config={"use_mtp_layernorm": True, "parallel_draft_step": 2}),
        [
            r"eagle_config\.use_mtp_layernorm is True, must be False",
            r"eagle_config\.parallel_draft_step is 2, must be 1",
        ],
    ),
    ("eagle3", lambda t, c, _: c.update(fc_norm="yes"), ["fc_norm must be true or false, got 'yes'"]),
    ("eagle3", lambda t, c, _: c.update(eagle_aux_hidden_state_layer_ids=[2, 1, 3]), [r"taps \[2, 1, 3\], as states"]),
    (
        "eagle3",
        lambda t, c, _: c.update(eagle_aux_hidden_state_layer_ids=[1, 2, 4]),
        [r"of 0\.\.3 in rising order for the target"],
    ),
    ("eagle3", lambda t, c, _: c.update(eagle_aux_hidden_state_layer_ids=[1, 2]), [r"fc\.weight: shape"]),
    (
        "eagle3",
        lambda t, c, _: c.update(num_aux_hidden_states=2),
        [r"num_aux_hidden_states is 2, but the states of 3 blocks are read: \[1, 2, 3\]"],
    ),
    ("eagle3", lambda t, c, _: c.pop("eagle_aux_hidden_state_layer_ids"), [r"\(missing\): taps \[2, 2, 1\]"]),
    (
        "eagle3",
        lambda t, c, _: c.update(eagle_config={"eagle_aux_hidden_state_layer_ids": given.TAPS}),
        [r"eagle_config\.eagle_aux_hidden_state_layer_ids \[1, 2, 3\]: each tap in the second must be one less"],
    ),
    ("eagle3", lambda t, c, _: c.update(rope_scaling={"type": "linear"}), ["cannot be scaled by rope_type 'linear'"]),
    (
        "eagle3",
        lambda t, c, _: c.update(rope_scaling={"type": "longrope"}),
        ["rope_type is 'longrope', allowed: default"],
    ),
    (
        "eagle3",
        lambda t, c, _: c.update(rope_scaling={"type": "dynamic", "factor": 2.0, "alpha": 1000.0}),
        [r"rope_parameters\.alpha is 1000\.0: the positions would be scaled differently"],
    ),
    ("eagle3", lambda t, c, _: c.update(rope_parameters={"rope_theta": 1e4}), ["rope_theta is 500.0, rope_parameters"]),
    (
        "eagle3",
        lambda t, c, _: c.update(
            rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
            rope_scaling={"type": "linear", "factor": 8.0},
        ),
        [r"rope_scaling\.factor is 8\.0, rope_parameters\.factor 2\.0"],
    ),
    (
        "eagle3",
        lambda t, c, _: t.update({"midlayer.self_attn.rotary_emb.inv_freq": 1e4 ** (-torch.arange(0, 16, 2) / 16)}),
        [r"inv_freq: differs from the frequencies of rope_theta 500"],
    ),
    (
        "eagle3",
        lambda t, c, target: t.update({"embed_tokens.weight": embedding(target) + 1}),
        [r"embed_tokens\.weight: 8224 of 8224 values differ from"],
    ),
    ("eagle3", lambda t, c, _: c.update(hidden_size=64), ["hidden_size is 64, the target .* has 32: it was made for"]),
    ("eagle3", lambda t, c, _: c.update(rms_norm_eps=10**400), ["rms_norm_eps must be a number above 0, got 1000"]),
    ("eagle3", lambda t, c, _: c.update(rope_theta=10**400), ["rope_theta must be a number above 0, got 1000"]),
    ("eagle", lambda t, c, _: c.update(head_dim=15), ["head_dim must be even, got 15"]),
    (
        "eagle",
        lambda t, c, _: c.update(
            rope_scaling={
                **{"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4},
                "original_max_position_embeddings": 64,
            }
        ),
        ["positions cannot be scaled by rope_type 'llama3'"],
    ),
    (
        "eagle3",
        lambda t, c, _: c.update(hidden_act="g" * 10_000),
        [r"hidden_act is 'g{79}\.\.\. \(10,002 characters\), must be"],
    ),
    (
        "eagle3",
        lambda t, c, _: t.update({f"x.{n}": torch.ones(1) for n in range(500)}),
        ["501 problems", "and 481 more"],
    ),
    ("eagle3", lambda t, c, _: c.update(vocab_size=300), ["vocab_size is 300, the target .* has 257"]),
    (
        "eagle3",
        lambda t, c, _: c.pop("intermediate_size"),
        ["intermediate_size must be .*, it is missing", "not checked"],
    ),
    (
        "speculators",
        lambda t, c, _: c.update(speculators_model_type="xpress"),
        ["is 'xpress': an XPress drafter, which is not supported yet"],
    ),
    (
        "speculators",
        lambda t, c, _: c.update(transformer_layer_config=None),
        ["transformer_layer_config must be a mapping"],
    ),
    (
        "speculators",
        lambda t, c, _: c["transformer_layer_config"].update(model_type="qwen3"),
        [r"transformer_layer_config\.model_type is 'qwen3', must be 'llama'"],
    ),
    ("eagle", lambda t, c, _: t.update({"fc.bias": torch.ones(31)}), [r"fc\.bias: shape \[31\], must be \[32\]"]),
    (
        "eagle",
        lambda t, c, _: t.update({"layers.0.input_layernorm.weight": torch.ones(32)}),
        [r"layers\.0\.input_layernorm\.weight: this layout has no such tensor"],
    ),
    (
        "eagle",
        lambda t, c, _: t.update({"lm_head.weight": torch.ones(257, 32)}),
        [r"lm_head\.weight: \d+ of 8224 values"],
    ),
    (
        "medusa",
        lambda t, c, _: c.update(medusa_num_heads=4),
        [r"medusa_num_heads is 4, model\.safetensors holds 3 heads"],
    ),
    (
        "medusa",
        lambda t, c, _: c.update(medusa_num_layers=3),
        [r"medusa_num_layers is 3, model\.safetensors holds 2 blocks a head"],
    ),
    (
        "medusa",
        lambda t, c, _: [t.pop(f"{head}.2.weight") for head in range(3)],
        ['blocks without output matrices, and .* only version "2"'],
    ),
    ("medusa", lambda t, c, _: t.pop("1.0.linear.bias"), [r"1\.0\.linear\.bias: missing, must be of shape \[32\]"]),
    (
        "medusa",
        lambda t, c, _: c.update(medusa_num_layers="2"),
        ["medusa_num_layers must be a whole number, got '2'"],
    ),
    (
        "vllm medusa",
        lambda t, c, _: c.update(num_attention_heads=2),
        ["num_attention_heads is 2: vLLM reads it as the number of heads"],
    ),
    (
        "vllm medusa",
        lambda t, c, _: c.update(medusa_fc_bias=False),
        ["medusa_fc_bias is not true, but the file holds biases"],
    ),
    (
        "vllm medusa",
        lambda t, c, _: t.update({"token_map": torch.arange(257)}),
        ["token_map: this layout has no such tensor"],
    ),
    (
        "vllm medusa",
        lambda t, c, _: c.update(truncated_vocab_size=100),
        [r"token_map: missing, must be of shape \[100\]"],
    ),
    (
        "vllm medusa",
        lambda t, c, _: c.update(truncated_vocab_size=300),
        [r"truncated_vocab_size must be 1\.\.vocab_size \(257\)"],
    ),
    (
        "cut medusa",
        lambda t, c, _: t["token_map"].add_(200),
        [r"token_map: gives ids 20\d\.\.4\d\d, must be in 0\.\.256"],
    ),
    ("cut medusa", lambda t, c, _: t["token_map"][1:].fill_(5), ["token_map: gives some ids twice"]),
    (
        "cut medusa",
        lambda t, c, _: t.update(token_map=t["token_map"].int()),
        [r"token_map: is torch\.int32, must be int64"],
    ),
    (
        "cut medusa",
        lambda t, c, _: c.pop("original_lm_head"),
        [r"lm_heads\.\*\.weight: missing|lm_heads\.1\.weight: missing"],
    ),
]


@pytest.mark.parametrize(("layout", "damage", "named"), FAULTS)
def test_what_is_not_supported_is_named(layout, damage, named, target, tmp_path):
    tensors, config = given.made(layout, target)
    damage(tensors, config, target)
    given.write(tmp_path / "theirs", tensors, config)
    with pytest.raises(CheckpointError) as caught:
        import_folder(tmp_path / "theirs", tmp_path / "out", target=target.name)
    for words in named:
        assert caught.match(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["eagle3", "speculators", "eagle", "medusa", "vllm medusa", "cut medusa"])
def test_an_undamaged_folder_is_imported(layout, target, tmp_path):
    """The control of the faults above."""
    import_folder(given.write(tmp_path / "theirs", *given.made(layout, target)), tmp_path / "out", target=target.name)


@pytest.mark.parametrize("layout", ["eagle3", "eagle", "medusa"])
def test_shuffled_names_fail(layout, target, tmp_path):
    tensors, config = given.made(layout, target)
    names = sorted(tensors)
    shuffled = dict(zip(names, [tensors[name] for name in names[1:] + names[:1]], strict=True))
    with pytest.raises(CheckpointError, match=r"shape|missing"):
        import_folder(given.write(tmp_path / "theirs", shuffled, config), tmp_path / "out", target=target.name)


def test_all_problems_are_reported_at_once(target, tmp_path):
    tensors, config = given.made("eagle3", target)
    del tensors["norm.weight"]
    tensors["fc.bias"] = torch.zeros(32)
    tensors["d2t"] = tensors["d2t"] + 1
    config |= {"hidden_act": "gelu", "norm_before_fc": True, "fc_nrom": 1}
    with pytest.raises(CheckpointError) as caught:
        import_folder(given.write(tmp_path / "theirs", tensors, config), tmp_path / "out", target=target.name)
    for words in (
        "norm.weight: missing",
        "fc.bias: this",
        "d2t",
        "hidden_act",
        "input_norm.weight: missing",
        "fc_nrom",
    ):
        assert words in str(caught.value)


def test_copies_of_the_targets_tensors_are_dropped(target, tmp_path):
    tensors, config = given.made("eagle", target)
    tensors |= {
        "embed_tokens.weight": embedding(target),
        "lm_head.weight": embedding(target),
        "fc.bias": torch.zeros(32),
    }
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    import_folder(given.write(tmp_path / "theirs", tensors, config), tmp_path / "out", target=target.name)
    assert given.same(given.held(tmp_path / "out"), given.eagle_tensors())


def test_a_map_of_ids_is_written_as_offsets(target, tmp_path):
    """d2t[i] = the target's id of i, as some files have it; as offsets it would name other tokens."""
    tensors, config = given.made("eagle3", target)
    tensors |= {"d2t": given.drafter_ids(), "t2d": tensors["t2d"].to(torch.uint8)}
    imported = import_folder(given.write(tmp_path / "theirs", tensors, config), tmp_path / "out", target=target.name)
    assert given.same(given.held(tmp_path / "out"), given.eagle3_tensors())
    assert "d2t: holds the target's ids; written as offsets, target id - draft id" in imported.notes


def test_without_t2d_a_map_is_read_if_only_one_reading_is_possible():
    offsets_R = torch.tensor([0, 0, 3, 3])
    assert torch.equal(offsets(offsets_R, None, size=10)[0], offsets_R)
    assert torch.equal(offsets(torch.tensor([0, 4, 8, 9]), None, size=10)[0], torch.tensor([0, 3, 6, 6]))
    assert "may hold offsets or ids" in offsets(torch.tensor([0, 2, 4]), None, size=10)[1][0]
    assert "occur twice or are not in 0..9" in offsets(torch.tensor([-1, 0, -1]), None, size=10)[1][0]


def test_a_whole_vocabulary_needs_no_map(target, tmp_path):
    tensors, config = given.made("eagle3", target)
    tensors |= {"d2t": torch.zeros(257).long(), "t2d": torch.ones(257).bool(), "lm_head.weight": torch.randn(257, 32)}
    config["draft_vocab_size"] = None
    import_folder(given.write(tmp_path / "theirs", tensors, config), tmp_path / "out", target=target.name)
    assert not {"d2t", "t2d"} & given.held(tmp_path / "out").keys()


def test_a_plain_lm_of_another_tokenizer_or_with_a_missing_tensor_is_refused(target, tmp_path):
    folder = tmp_path / "theirs"
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    tensors = given.held(folder)
    del tensors["model.norm.weight"]
    given.write(folder, tensors | {"more": torch.ones(1)}, json.loads((folder / "config.json").read_text()))
    text = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder, tmp_path / "out", target=target.name)
    for words in ("differs from the target's in 2 of 257 tokens", "model.norm.weight: missing", "more: this layout"):
        assert words in str(caught.value)


def test_a_plain_lm_with_fewer_rows_than_the_target_has_tokens_is_refused(target, tmp_path):
    folder = tmp_path / "theirs"
    random_llama(seed=3, vocab_size=100).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    message = "vocab_size is 100, the target's tokenizer has 257 tokens: the last ones have no row"
    with pytest.raises(CheckpointError, match=message):
        import_folder(folder, tmp_path / "out", target=target.name)
    with pytest.raises(CheckpointError, match=message):
        read_drafter(folder, target)


def test_a_target_whose_architecture_ties_its_head_has_the_embedding_as_head(target, tmp_path):
    """Gemma's is: its architecture ties them."""
    silent = Path(shutil.copytree(target.name, tmp_path / "silent"))
    config = json.loads((silent / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is True
    (silent / "config.json").write_text(json.dumps(config))
    tensors, config = given.made("eagle", target)
    tensors["lm_head.weight"] = embedding(target).clone()
    folder = given.write(tmp_path / "theirs", tensors, config)
    for name, own in (("a", str(silent)), ("b", target.name)):
        notes = import_folder(folder, tmp_path / name, target=own).notes
        assert any("lm_head.weight: dropped" in note for note in notes)


def test_a_target_may_have_other_names_for_its_sizes(tmp_path):
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=4, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    theirs = TargetFiles.named(str(tmp_path / "gpt2"))
    assert (theirs.size("hidden_size"), theirs.size("num_hidden_layers"), theirs.size("vocab_size")) == (32, 4, 257)
    folder = given.write(tmp_path / "theirs", given.vllm_medusa_tensors(), given.vllm_medusa_config())
    import_folder(folder, tmp_path / "out", target=theirs.name)
    with pytest.raises(CheckpointError, match="head_dim must be a whole number, got None"):
        theirs.size("head_dim")


STRANGE: list[Any] = [None, -1, 0, 1.5, "x", [], ["x"], {}, {"x": 1}, True]


@pytest.mark.parametrize("layout", ["eagle3", "speculators", "eagle", "medusa", "vllm medusa"])
def test_any_value_of_a_field_is_imported_or_refused_with_a_message(layout, target, tmp_path):
    tensors, config = given.made(layout, target)
    folder, stand = given.write(tmp_path / "theirs", tensors, config), TargetFiles.named(target.name)
    sound = read_given(folder)
    refused = 0
    places = [config, config["transformer_layer_config"]] if layout == "speculators" else [config]
    for place in places:
        for key in {*place, "eagle_config", "rope_parameters", "model", "num_heads", "truncated_vocab_size"}:
            kept = dict(place)
            for value in STRANGE:
                place[key] = value
                one = replace(sound, config=json.loads(json.dumps(config)))
                try:
                    converted(one, layout_of(one), stand)
                except CheckpointError:
                    refused += 1
            place.clear()
            place.update(kept)
    assert refused > 30
