"""Tensors that are loaded one by one equal those of a fully loaded target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, Qwen3Config

from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import TensorFiles
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.absent_target import AbsentTarget, bare_model, outer_model
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.logits import head_logits
from drafttrain.target_model.meta_model import load_tensors, meta_model, stored_tensors
from tests.conftest import byte_tokenizer, random_llama

SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    # Its embedding multiplies by a computed buffer that is not stored; its head is tied to the embedding.
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16),
    # Its files may leave the trunk's prefix out, and it has learned positions.
    "gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    # Its head has another name in the files.
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}


@pytest.fixture(params=["llama", *CONFIGS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    name = request.param
    model = random_llama() if name == "llama" else AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (model.base_model if name == "gpt2" else model).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_outer_modules_equal_the_loaded_targets_and_blocks_have_no_weights(folder: Path) -> None:
    settings = TargetSettings(model=str(folder))
    random_before = torch.get_rng_state()
    outer = AbsentTarget.load(settings)
    assert torch.equal(torch.get_rng_state(), random_before), "the run's own random numbers are left alone"
    whole = Target.load(settings)
    assert all(parameter.is_meta for parameter in blocks(outer.model).parameters())
    tokens_BT, states_ND = torch.arange(20)[None], torch.randn(5, 32)
    for part in (lambda model: model.get_input_embeddings()(tokens_BT), lambda model: final_norm(model)(states_ND)):
        torch.testing.assert_close(part(outer.model), part(whole.model), rtol=0, atol=0)
    torch.testing.assert_close(head_logits(outer.model, states_ND), head_logits(whole.model, states_ND), rtol=0, atol=0)
    for name in ("vocab_size", "num_tokens", "eos_token_ids", "fingerprint", "tokenizer_fingerprint", "device", "name"):
        assert getattr(outer, name) == getattr(whole, name), name
    assert outer.model.dtype == whole.model.dtype
    with pytest.raises(CheckpointError, match=r"is not loaded \(train.target_placement: absent\)"):
        outer.read(tokens_BT, tokens_BT, None)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_meta_model_with_all_its_tensors_is_the_model(folder: Path) -> None:
    settings = TargetSettings(model=str(folder))
    model = bare_model(settings)
    load_tensors(model, stored_tensors(model), TensorFiles(folder), device=torch.device("cpu"))
    whole = Target.load(settings)
    assert Target(model, None, name="", fingerprint="").weights_digest() == whole.weights_digest()
    tokens_BT = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens_BT).logits, whole.model(tokens_BT).logits, rtol=0, atol=0)


def test_the_type_and_the_generation_settings_are_used(tiny_folder: Path) -> None:
    settings = TargetSettings(model=str(tiny_folder), dtype="bfloat16", attention="eager")
    outer, whole = outer_model(settings), Target.load(settings).model
    assert {p.dtype for p in outer.parameters()} == {torch.bfloat16}
    assert outer.config._attn_implementation == whole.config._attn_implementation == "eager"
    assert outer.generation_config.to_dict() == whole.generation_config.to_dict()


def test_weights_with_unknown_names_are_refused_naming_one(tiny_folder: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model = meta_model(tiny_folder, dtype="float32", attention="sdpa", trust_remote_code=False, device=cpu)
    with pytest.raises(
        CheckpointError, match=r"no tensor for model.embed_tokens.weight in its files.*use .*replicated"
    ):
        load_tensors(model, stored_tensors(model), TensorFiles(tmp_path), device=cpu)
