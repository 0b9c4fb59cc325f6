"""EAGLE-3 starts from the gain of its target's final norm, for any kind of norm."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from drafttrain.drafters.eagle.eagle3 import Eagle3Drafter, Eagle3Settings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import final_norm
from tests.conftest import byte_tokenizer
from tests.eval.decoding import PROMPTS, decode, greedy

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2}
WITHOUT_WEIGHT = {
    "olmo": transformers.OlmoConfig(**{name: value for name, value in LLAMA.items() if name != "head_dim"}),
    "nanochat": transformers.NanoChatConfig(**LLAMA),
}
WITH_WEIGHT = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "gemma": transformers.GemmaConfig(**LLAMA),
    "cohere": transformers.CohereConfig(**{name: value for name, value in LLAMA.items() if name != "head_dim"}),
    "gpt2": transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=3, n_head=2),
}


def target_of(config: Any) -> Target:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


def start_of(target: Target) -> Eagle3Drafter:
    return Eagle3Drafter.create(Eagle3Settings(), target=target, tokenizer=target.tokenizer)


@pytest.mark.parametrize("name", WITHOUT_WEIGHT)
def test_a_norm_without_a_weight_has_a_gain_of_one_and_its_drafter_decodes(name: str) -> None:
    target = target_of(WITHOUT_WEIGHT[name])
    drafter = start_of(target)
    torch.testing.assert_close(drafter.norm.weight.detach(), torch.ones(32))
    (found,) = decode(target, drafter.eval().proposer(target), prompts=PROMPTS[:1], new=8, stop_tokens=())
    assert list(found.tokens) == greedy(target, PROMPTS[0], 8)


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_the_gain_is_the_factor_on_a_normed_state(name: str) -> None:
    target = target_of(WITH_WEIGHT[name])
    norm: Any = final_norm(target.model)
    wanted_D = torch.rand(32) + 0.5
    with torch.no_grad():
        norm.weight.copy_(wanted_D - 1 if name == "gemma" else wanted_D)
        if getattr(norm, "bias", None) is not None:
            nn.init.normal_(norm.bias)
    torch.testing.assert_close(start_of(target).norm.weight.detach(), wanted_D)
