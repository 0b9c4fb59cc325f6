"""A target in a GGUF file is the model that the file holds, to the bit; what would be another model is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.export.gguf import permuted
from drafttrain.serving.engines import engine_of
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.target_model.gguf_checks import readable_header
from drafttrain.target_model.gguf_folder import MADE_FROM, gguf_file_of
from drafttrain.target_model.gguf_header import read_header
from drafttrain.target_model.tokenizer import load_tokenizer
from tests.export.test_gguf import MODELS, SIZES, merging_tokenizer, saved
from tests.target_model.gguf_files import Change, gguf_of, named_by_llama_cpp, quantized

TEXTS = ("abc 12ab", "\n\n1. one\n\n2.  22", "x  12 <|end|>hello", "  12")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (MODELS["llama"], "smollm"),
    "llama with biases": (MODELS["llama with biases"], "gpt-2"),
    "qwen2": (MODELS["qwen2"], "qwen2"),
    "qwen3": (MODELS["qwen3"], "gpt-2"),
    "llama 3": (lambda: scaled(LLAMA3 | {"original_max_position_embeddings": 8192}), "llama-bpe"),
    "yarn": (lambda: scaled(YARN), "llama-bpe"),
}


def scaled(rope: dict[str, Any]) -> Any:
    """Return a Llama with scaled positions."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500000.0, **rope}))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTTRAIN_TARGETS", str(tmp_path / "targets"))


def logits(folder: Path | str) -> torch.Tensor:
    """Return the logits of a target on one text."""
    tokens_BT = torch.arange(2, 62).view(1, -1)
    return Target.load(TargetSettings(model=str(folder))).model(tokens_BT).logits


def ids(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], return_dict=False)
    return [*(tokenizer(text).input_ids for text in TEXTS), chat]


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    model, way = CASES[name]
    source = saved(model(), tmp_path / "source", merging_tokenizer(way))
    path = gguf_of(source, tmp_path / "model.gguf")
    made = resolve_folder(str(path))
    first, second = (Target.load(TargetSettings(model=str(one))) for one in (source, path))
    held = second.model.state_dict()
    assert all(torch.equal(value, held[key]) for key, value in first.model.state_dict().items())
    assert torch.allclose(logits(source), logits(path), atol=1e-5)
    assert ids(source) == ids(made)
    assert first.tokenizer.chat_template == second.tokenizer.chat_template
    assert set(first.eos_token_ids) == set(second.eos_token_ids) == {0, 1}
    assert (second.name, gguf_file_of(made)) == (str(path), path)


def settings_of(name: str, **own: Any) -> dict[str, Any]:
    """Return the settings in a file of a model with `SIZES`."""
    epsilon = "layer_norm_epsilon" if name in ("starcoder2", "stablelm") else "layer_norm_rms_epsilon"
    held = {
        **{"context_length": 128, "block_count": 2, "feed_forward_length": 48, "embedding_length": 32},
        **{"attention.head_count": 4, "attention.head_count_kv": 2, f"attention.{epsilon}": 1e-5, "vocab_size": 270},
        **{key.replace("__", "."): value for key, value in own.items()},
    }
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in held.items()}


def starcoder2(**own: Any) -> Any:
    rope = {"rope_theta": 999999.0, "rope_type": "default"}
    return Starcoder2ForCausalLM(Starcoder2Config(**SIZES | own, norm_epsilon=1e-5, rope_parameters=rope))


FURTHER: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "starcoder2": (starcoder2, {"rope__freq_base": 999999.0}),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)), {"rope__dimension_count": 8}),
    "stablelm": (
        lambda: StableLmForCausalLM(StableLmConfig(**SIZES, partial_rotary_factor=0.25)),
        {"rope__dimension_count": 2, "use_parallel_residual": False},
    ),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_architectures_load_from_files_with_the_names_of_llama_cpp(name: str, tmp_path: Path) -> None:
    made, own = FURTHER[name]
    model = made()
    source = saved(model, tmp_path / "source")
    path = named_by_llama_cpp(model, source, tmp_path / "model.gguf", settings_of(name, **own))
    assert torch.allclose(logits(source), logits(path), atol=1e-5)
    if name == "starcoder2":  # control: transformers alone leaves the base of its rotation at another default
        other = settings_of(name, **(own | {"rope__freq_base": 10000.0}))
        assert not torch.allclose(
            logits(source), logits(named_by_llama_cpp(model, source, tmp_path / "o.gguf", other)), atol=1e-3
        )


def gemma3(**own: Any) -> Any:
    """Return a Gemma 3 whose layers with a window rotate differently from the sixth, whose positions are scaled."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
    }
    sizes = SIZES | {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes | own, rope_parameters=rope))
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(value, std=0.3)
    return model


GEMMA3 = {
    **{"block_count": 6, "attention__key_length": 16, "attention__value_length": 16, "attention__sliding_window": 8},
    **{"rope__freq_base": 500000.0, "rope__freq_base_swa": 5000.0},
    **{"rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
    "attention__layer_norm_rms_epsilon": 1e-6,
}


@pytest.mark.long
def test_gemma3_rotates_its_types_of_layers_differently(tmp_path: Path) -> None:
    model = gemma3()
    source = saved(model, tmp_path / "source")

    def differs(added_to_norms: float = 1.0, **changed: Any) -> bool:
        settings = settings_of("gemma3", **{k: v for k, v in (GEMMA3 | changed).items() if v is not None})
        path = named_by_llama_cpp(model, source, tmp_path / "m.gguf", settings, added_to_norms=added_to_norms)
        return not torch.allclose(logits(source), logits(path), atol=1e-4)

    assert not differs()
    # Controls: each part counts in these logits.
    assert differs(rope__freq_base_swa=None)
    assert differs(rope__freq_base=None)
    assert differs(rope__scaling__factor=4.0)
    assert differs(attention__sliding_window=16)
    assert differs(added_to_norms=0.0)


@pytest.mark.slow
def test_a_second_architecture_goes_the_whole_way_from_its_file(tmp_path: Path) -> None:
    model = starcoder2(num_hidden_layers=4, max_position_embeddings=512)
    path = named_by_llama_cpp(
        model,
        saved(model, tmp_path / "source"),
        tmp_path / "model.gguf",
        settings_of("starcoder2", rope__freq_base=999999.0, block_count=4, context_length=512),
    )
    words = ["fit", "tiny_eagle3", "--smoke", "--runs", str(tmp_path), f"target.model={path}"]
    done = CliRunner().invoke(app, [*words, "drafter.draft_vocab_size=128", "eval.max_new_tokens=16"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(next(tmp_path.glob("*/eval.json")).read_text())
    assert result["target"]["name"] == str(path)


def test_control_rows_in_the_order_of_hugging_face_give_another_model(tmp_path: Path) -> None:
    source = saved(MODELS["llama"](), tmp_path / "source")

    def not_permuted(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if ".attn_q." in name:  # two halves of a head become neighbours: permuted again is not undone
                tensors[name] = permuted(value, num_heads=4)

    assert not torch.allclose(logits(source), logits(gguf_of(source, tmp_path / "m.gguf", not_permuted)), atol=1e-2)


def test_control_transformers_alone_splits_smollm_differently(tmp_path: Path) -> None:
    source = saved(MODELS["llama"](), tmp_path / "source", merging_tokenizer("smollm"))
    path = gguf_of(source, tmp_path / "model.gguf")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path), gguf_file=path.name)
    assert [theirs(text).input_ids for text in TEXTS] != ids(source)[:-1]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_quantized_file_gives_exactly_its_dequantized_weights(kind: str, tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size": 64}
    source = saved(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), tmp_path / "source")
    values = quantized(gguf_of(source, tmp_path / "exact.gguf"), tmp_path / "small.gguf", kind)
    held = Target.load(TargetSettings(model=str(tmp_path / "small.gguf"))).model.state_dict()
    assert torch.equal(held["model.embed_tokens.weight"], values["token_embd.weight"])
    assert torch.equal(held["model.layers.1.mlp.down_proj.weight"], values["blk.1.ffn_down.weight"])
    query = held["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(permuted(query, num_heads=4), values["blk.1.attn_q.weight"])
    error = (logits(source) - logits(tmp_path / "small.gguf")).abs().mean() / logits(source).std()
    assert 0 < error < (0.05 if kind == "Q8_0" else 0.5)


def test_the_folder_is_made_once_and_follows_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(MODELS["llama"](), tmp_path / "source")
    path = gguf_of(source, tmp_path / "model.gguf")
    made = resolve_folder(str(path))
    first = fingerprint_of(made)
    assert "making a model folder" in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "model.gguf")
    assert resolve_folder(str(moved)) == made
    assert gguf_file_of(made) == moved
    assert engine_of("llama.cpp").target_as(made) == moved
    assert capsys.readouterr().err == ""
    gguf_of(source, moved, lambda settings, tensors: tensors["output_norm.weight"].mul_(2))
    assert fingerprint_of(resolve_folder(str(moved))) != first


def drop_tokenizer(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in settings if key.startswith("tokenizer.")]:
        del settings[key]


def test_a_file_without_a_readable_tokenizer_needs_one(tmp_path: Path) -> None:
    source = saved(MODELS["llama"](), tmp_path / "source")
    for name, change, reason in (
        ("bare", drop_tokenizer, "bare.gguf: has no tokenizer in it: set target.tokenizer"),
        (
            "other",
            lambda s, t: s.update({"tokenizer.ggml.pre": "viking"}),
            r"not known here \(tokenizer.ggml.pre: viking",
        ),
    ):
        path = gguf_of(source, tmp_path / f"{name}.gguf", change)
        with pytest.raises(CheckpointError, match=reason):
            Target.load(TargetSettings(model=str(path)))
        target = Target.load(TargetSettings(model=str(path), tokenizer=str(source)))
        assert target.tokenizer("abc").input_ids == load_tokenizer(source)("abc").input_ids
    whole = gguf_of(source, tmp_path / "whole.gguf")
    target = Target.load(TargetSettings(model=str(tmp_path / "bare.gguf"), tokenizer=str(whole)))
    assert target.tokenizer("abc").input_ids == load_tokenizer(source)("abc").input_ids


def longer(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["blk.0.attn_sinks.weight"] = torch.ones(4)


REFUSED: dict[str, tuple[Change, str]] = {
    "architecture": (
        lambda s, t: s.update({"general.architecture": "rwkv7"}),
        "cannot read the architecture 'rwkv7' from GGUF files, only bloom, .*llama",
    ),
    "adapter": (lambda s, t: s.update({"general.type": "adapter"}), "holds no model .its general.type is 'adapter'"),
    "part": (lambda s, t: s.update({"split.count": 3}), "is one of 3 parts of a split model"),
    "setting": (
        lambda s, t: s.update({"llama.attention.sliding_window": 4096}),
        "has settings that transformers does not read: attention.sliding_window",
    ),
    "scaling": (
        lambda s, t: s.update({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
        "rope.scaling.type is 'longrope'",
    ),
    "frequencies": (
        lambda s, t: t.update({"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 9.0])}),
        "rope_freqs.weight is not the scaling of a Llama 3 model",
    ),
    "missing": (lambda s, t: t.pop("blk.1.ffn_up.weight"), "weights are missing in it: model.layers.1.mlp.up_proj"),
    "left out": (longer, "reads [0-9,]+ of them, so it would be another model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_model_is_refused(name: str, tmp_path: Path) -> None:
    change, reason = REFUSED[name]
    path = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf", change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        resolve_folder(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "targets").glob(f"*/{MADE_FROM}"))


def test_what_is_not_a_whole_file_is_refused(tmp_path: Path) -> None:
    path = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf")
    whole = path.read_bytes()
    header = read_header(path)
    assert header.tensors[-1].start < len(whole)
    for content, reason in (
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04", "is not a GGUF file"),
        (b"GGUF\x09\x00\x00\x00" + whole[8:], "is of GGUF version 9, must be 2 or 3"),
        (whole[:1000], "is truncated: it ends within its header, after 1,000 bytes"),
        (whole[:-500], f"is truncated: it has [0-9,]+ of {len(whole):,} bytes"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "is truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            resolve_folder(str(path))
    part = path.rename(tmp_path / "model-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match="is part 2 of 3 of a split model: merge"):
        resolve_folder(str(part))


def test_types_that_cannot_be_dequantized_are_refused(tmp_path: Path) -> None:
    path = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf")
    stored = read_header(path).tensors[0]
    whole = path.read_bytes()
    at = whole.index(stored.name.encode()) + len(stored.name) + 4 + 8 * len(stored.shape)
    for number, name in ((15, "Q8_K"), (999, "number 999")):
        path.write_bytes(whole[:at] + number.to_bytes(4, "little") + whole[at + 4 :])
        with pytest.raises(CheckpointError, match=rf"type {name} \(such as {stored.name}\) cannot be dequantized"):
            readable_header(path)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"model.gguf: GGUF needs the package gguf: pip install gguf"):
        resolve_folder(str(path))


def test_a_full_disk_is_reported_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf")
    monkeypatch.setattr("drafttrain.target_model.gguf_folder.SPARE_BYTES", 1 << 60)
    with pytest.raises(CheckpointError, match="set DRAFTTRAIN_TARGETS to a folder on another disk"):
        resolve_folder(str(path))


def test_recipe_check_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_text("no model")
    for name, reason in (("bad", "is not a GGUF file"), ("absent", "no such file")):
        path = tmp_path / f"{name}.gguf"
        done = CliRunner().invoke(app, ["recipe", "check", "demo", f"target.model={path}"])
        assert done.exit_code == 2
        assert f"target.model: {path}: {reason}" in done.stderr.replace("\n", " ")


def test_what_a_made_folder_names(tmp_path: Path) -> None:
    path = gguf_of(saved(MODELS["llama"](), tmp_path / "source"), tmp_path / "model.gguf")
    made = resolve_folder(str(path))
    config = json.loads((made / "config.json").read_text())
    assert not {"quantization_config", "transformers_version"} & config.keys()
    assert json.loads((made / MADE_FROM).read_text())["file"] == str(path)
