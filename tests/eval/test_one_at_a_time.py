"""Prompts that a model cannot batch are decoded one at a time, with the same texts."""

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import decode, greedy

NEW = 12
PROMPTS = [Prompt(str(i), [1 + i, 2, 3, *range(20, 20 + 3 * i)]) for i in range(3)]


def short_window(*, seed: int) -> Any:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).double().eval()


def without_positions() -> Any:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2, eos_token_id=None)
    return BloomForCausalLM(config).double().eval()


def target_of(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


@pytest.mark.parametrize("model", [short_window(seed=0), without_positions()], ids=["sliding window", "no positions"])
def test_prompts_of_different_lengths_have_the_same_texts_as_alone(model: Any) -> None:
    target = target_of(model)
    tasks = [Task(prompt.id, list(prompt.tokens), Sampling()) for prompt in PROMPTS]
    wanted = [greedy(target, prompt, NEW) for prompt in PROMPTS]
    assert continuations(tasks, target, max_new_tokens=NEW, seed=0) == wanted
    drafter = CausalLMDrafter(random_llama(seed=1, num_layers=1).double())
    found = decode(target, drafter.proposer(target), prompts=PROMPTS, new=NEW, stop_tokens=())
    assert [list(one.tokens) for one in found] == wanted
    assert [one.id for one in found] == [prompt.id for prompt in PROMPTS]


def test_a_drafter_with_a_short_window_drafts_one_prompt_at_a_time(tiny_target: Target) -> None:
    target = target_of(random_llama().double())
    drafter = CausalLMDrafter(short_window(seed=1))
    found = decode(target, drafter.proposer(target), prompts=PROMPTS, new=NEW, stop_tokens=())
    assert [list(one.tokens) for one in found] == [greedy(target, prompt, NEW) for prompt in PROMPTS]


def test_the_reason_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    target = Target(short_window(seed=0), byte_tokenizer(), name="logged/once", fingerprint="")
    tasks = [Task(prompt.id, list(prompt.tokens), Sampling()) for prompt in PROMPTS]
    for _ in range(2):
        continuations(tasks, target, max_new_tokens=NEW, seed=0)
    logged = capsys.readouterr().err
    assert (
        logged.count("logged/once: its texts are generated one at a time: texts reach its sliding window of 8 tokens")
        == 1
    )


def test_texts_below_the_window_are_still_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = short_window(seed=0)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    tasks = [Task(str(i), list(range(1, 3 + i)), Sampling()) for i in range(2)]
    continuations(tasks, target_of(model), max_new_tokens=4, seed=0)
    assert set(rows) == {2}
