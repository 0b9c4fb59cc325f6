"""Flash attention that reads documents one by one gives the states of single documents, without a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.integrations import sdpa_attention

from drafttrain.core.batches import PackedDocuments
from drafttrain.target_model import packed_forward
from drafttrain.target_model.documents import document_states, probe, reads_packed, separates_documents

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
MODELS = {
    "llama": (transformers.LlamaConfig(**LLAMA), True),
    "qwen3": (transformers.Qwen3Config(**LLAMA, head_dim=8), True),
    "granite": (transformers.GraniteConfig(**LLAMA, attention_multiplier=0.7), True),
    "gpt2": (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), True),
    # A window, extra tokens that each head attends to, positions that do not separate documents.
    "mistral": (transformers.MistralConfig(**LLAMA, sliding_window=4), False),
    "gemma3": (transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=4), False),
    "bloom": (transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), False),
}


@pytest.fixture(autouse=True)
def flash_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernel on the CPU too."""
    monkeypatch.setattr(packed_forward, "flash_on_cuda", lambda *_: True)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name][0]).eval()


def rows() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return documents, and two rows of them: of three, one of a single token; and of one with padding."""
    torch.manual_seed(1)
    texts = [torch.randint(2, 64, (size,)) for size in (7, 1, 5, 9)]
    padding = torch.zeros(4, dtype=torch.long)
    tokens = torch.stack([torch.cat(texts[:3]), torch.cat([texts[3], padding])])
    positions = [torch.cat([torch.arange(n) for n in sizes]) for sizes in ((7, 1, 5), (9, 4))]
    return texts, tokens, torch.stack(positions)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_have_the_states_of_single_ones(name: str) -> None:
    model, (texts, tokens, positions) = model_of(name), rows()
    assert reads_packed(model) == MODELS[name][1]
    with torch.no_grad():
        final, hidden = document_states(model, tokens, positions, hidden=(1,))
        places = zip(texts, [(0, 0), (0, 7), (0, 8), (1, 0)], strict=True)
        for text, (row, column) in places:
            alone = model.base_model(text[None], use_cache=False, output_hidden_states=True)
            span = slice(column, column + len(text))
            torch.testing.assert_close(final[row, span], alone.last_hidden_state[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(hidden[1][row, span], alone.hidden_states[1][0], rtol=0, atol=1e-5)


def test_no_mask_no_repeated_heads_and_the_attention_is_restored(monkeypatch) -> None:
    model, (_, tokens, positions) = model_of("llama"), rows()
    probe(model)
    assert reads_packed(model)
    seen = []
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *_: pytest.fail("heads are repeated"))
    columns = packed_forward.Columns
    monkeypatch.setattr(packed_forward, "Columns", lambda k, v, d: seen.append(k.shape) or columns(k, v, d))
    with torch.no_grad():
        document_states(model, tokens, positions, documents=PackedDocuments.of(positions))
    assert seen == [(2, 2, 13, 8)] * 2
    assert model.config._attn_implementation == "sdpa"


def test_a_forward_with_gradients_is_read_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation checkpointing recomputes blocks in the backward pass, after the attention was restored."""
    model, (_, tokens, positions) = model_of("llama"), rows()
    assert reads_packed(model)
    monkeypatch.setattr(packed_forward, "Columns", lambda *_: pytest.fail("read packed"))
    document_states(model, tokens, positions)[0].sum().backward()


def test_the_users_attention_is_kept() -> None:
    model = transformers.AutoModelForCausalLM.from_config(MODELS["llama"][0], attn_implementation="eager").eval()
    assert not reads_packed(model)


def test_control_a_model_with_its_own_attention_code_gets_a_mask(monkeypatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(packed_forward, "given_attention", lambda _: [])
    assert separates_documents(model)
    assert not reads_packed(model)
