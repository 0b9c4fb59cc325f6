"""Folders that are not a causal LM are refused in one sentence that says what they are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
)

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.loading import load_causal_lm
from drafttrain.target_model.logits import check_logits
from drafttrain.target_model.tokenizer import load_tokenizer
from tests.conftest import byte_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUANTIZED: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
    "bitsandbytes": {"load_in_4bit": True},
}
PACKAGE = {"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors"}


def folder_with(folder: Path, **files: Any) -> Path:
    """Write files, given by name with __ for the dot; a dict is written as JSON."""
    folder.mkdir()
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def llama_with(folder: Path, **fields: Any) -> Path:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, "vocab_size": 257, **fields}
    return folder_with(folder, config__json=config, model__safetensors="")


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda at: folder_with(at), "is empty"),
    "no config": (
        lambda at: folder_with(at, notes__txt="a"),
        "no config.json here: not a model folder (it contains notes.txt)",
    ),
    "no weights": (lambda at: folder_with(at, config__json={"model_type": "llama"}), "a configuration without weights"),
    "pickled": (
        lambda at: folder_with(at, config__json={}, pytorch_model__bin=""),
        "pickled weights are not read: pytorch_model.bin",
    ),
    "gguf": (lambda at: folder_with(at, model__gguf=""), "contains GGUF files"),
    "diffusers": (lambda at: folder_with(at, model_index__json={}), "is a pipeline of diffusers"),
    "original": (lambda at: folder_with(at, params__json={}), "not in Hugging Face's layout"),
    "adapter alone": (lambda at: folder_with(at, adapter_config__json={"peft_type": "LORA"}), "names no base model"),
    "adapter without its base": (
        lambda at: folder_with(at, adapter_config__json={"base_model_name_or_path": "/nowhere/base"}),
        "its base model '/nowhere/base' is not here",
    ),
    "adapter": (
        lambda at: folder_with(at, adapter_config__json={"base_model_name_or_path": "owner/base"}),
        "for owner/base: merge it",
    ),
    "adapter with a configuration": (
        lambda at: folder_with(
            at,
            config__json={"model_type": "llama"},
            adapter_config__json={"base_model_name_or_path": "owner/base"},
            adapter_model__safetensors="",
        ),
        "is an adapter",
    ),
    "shards missing": (
        lambda at: folder_with(
            at,
            config__json={"model_type": "llama"},
            model__safetensors__index__json={"weight_map": {"a": "1.safetensors"}},
        ),
        "1 of 1 files named in model.safetensors.index.json are missing: 1.safetensors",
    ),
    "encoder": (
        lambda at: folder_with(
            at, config__json=BertConfig(architectures=["BertForMaskedLM"]).to_dict(), model__safetensors=""
        ),
        "BertForMaskedLM is an encoder",
    ),
    "seq2seq": (
        lambda at: folder_with(
            at, config__json=T5Config(architectures=["T5ForConditionalGeneration"]).to_dict(), model__safetensors=""
        ),
        "T5ForConditionalGeneration is an encoder-decoder model",
    ),
    "unknown": (lambda at: llama_with(at, model_type="no_such"), "does not know model_type 'no_such'"),
    "nameless": (lambda at: llama_with(at, model_type=None), "model_type is missing"),
    "own code": (
        lambda at: llama_with(at, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"}),
        "set target.trust_remote_code: true",
    ),
    "unknown quantization": (
        lambda at: llama_with(at, quantization_config={"quant_method": "no_such"}),
        "quantized by 'no_such', which transformers does not support",
    ),
    "damaged weights": (lambda at: llama_with(at), "cannot load a causal LM"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_kind_of_folder_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    make, sentence = REFUSED[kind]
    folder = make(tmp_path / "given")
    with pytest.raises(CheckpointError) as refused:
        load_causal_lm(folder)
    assert str(refused.value).startswith(f"{folder}: ")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_without_their_package_are_refused_in_one_sentence(tmp_path: Path, method: str) -> None:
    if importlib.util.find_spec(PACKAGE.get(method, method)):
        pytest.skip(f"{method} can be loaded here")
    folder = llama_with(tmp_path / "given", quantization_config={"quant_method": method, **QUANTIZED[method]})
    with pytest.raises(CheckpointError, match=f"quantized by {method}: ") as refused:
        load_causal_lm(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    for name, sentence in (("model.gguf", "is not a GGUF file"), ("model.safetensors", "is a file")):
        (tmp_path / name).write_text("")
        with pytest.raises(CheckpointError, match=sentence):
            resolve_folder(str(tmp_path / name))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer here \(no tokenizer\.json\)"):
        load_tokenizer(tmp_path)


def gemma3() -> Any:
    text = {**SMALL, "vocab_size": 257, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=256,
        boi_token_index=255,
        eoi_token_index=254,
    )
    return Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    text = LlamaConfig(**SMALL, vocab_size=257, initializer_range=0.2)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlavaConfig(
        text_config=text,
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        image_token_index=256,
    )
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gemma3, llava])
def test_the_language_model_inside_a_multimodal_one_is_the_target(tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    target = Target.load(TargetSettings(model=str(tmp_path)))
    check_logits(target.model)
    tokens_BT = torch.tensor([[5, 9, 77, 30, 8]])
    seen = target.read(tokens_BT, torch.arange(5)[None], TargetNeeds(logits=True))
    with torch.no_grad():
        wanted_BTV = whole(input_ids=tokens_BT).logits
    assert seen.logits_BTV is not None
    torch.testing.assert_close(seen.logits_BTV, wanted_BTV, rtol=1e-4, atol=1e-5)
    assert not any("vision" in name for name, _ in target.model.named_parameters())
