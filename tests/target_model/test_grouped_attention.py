"""Grouped attention gives the logits of eager attention, and is seen by nothing but a call of `CachedLM`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from drafttrain.target_model import grouped_attention
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.grouped_attention import NAME, reads_keys_once

EXACT = 1e-12
HEADS = 6
CHAIN = [-1, 0, 1, 2, 3, 4]
TREE = [-1, 0, 0, 1, 2, 2]
EQUAL = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
RAGGED = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
PATHS = [[0, 2, 5], [0, 1], [0]]


def llama(*, groups: int, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=groups, initializer_range=0.2, **more)
    return LlamaForCausalLM(config).double().eval()


def eager_in_float64(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, Tensor]:
    """Transformers' eager attention, whose softmax would be float32."""
    count = module.num_key_value_groups
    key, value = (states.repeat_interleave(count, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def logits_of_rounds(lm: CachedLM, prompts: list[list[int]], tree: list[int]) -> list[Tensor]:
    """Return the logits of a proposal, a single token and a longer call, for fewer and fewer sequences."""
    lm.begin(prompts)
    found: list[Tensor] = []
    for number in range(3):
        rows = range(len(prompts) - number)
        seen = lm.forward([[20 + number + row, 31, 32, 33, 34, 35] for row in rows], parents=[tree for _ in rows])
        lm.keep(PATHS[: len(rows)] if tree is TREE else [[0, 1]] * len(rows))
        found += [one.logits_BTV[0] for one in seen if one.logits_BTV is not None]
        found.append(lm.step([40 + row for row in rows]))
        seen = lm.forward([list(range(50, 150))] * len(rows))
        lm.keep([[0, 1, 2]] * len(rows))
        found += [one.logits_BTV[0] for one in seen if one.logits_BTV is not None]
        if number < 2:
            lm.drop(list(rows)[1:])
    return found


def difference(model: Any, prompts: list[list[int]], tree: list[int], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the largest difference of logits from eager attention's."""
    found = logits_of_rounds(CachedLM(model, name="t"), prompts, tree)
    monkeypatch.setitem(AttentionInterface._global_mapping, "eager", eager_in_float64)
    model.set_attn_implementation("eager")
    assert not reads_keys_once(model)
    expected = logits_of_rounds(CachedLM(model, name="t"), prompts, tree)
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("prompts", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
def test_logits_are_those_of_eager_attention(groups, prompts, tree, monkeypatch):
    model = llama(groups=groups)
    assert reads_keys_once(model)
    assert difference(model, prompts, tree, monkeypatch) < EXACT


@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
def test_control_a_mask_for_other_rows_is_seen(tree, monkeypatch):
    shifted = grouped_attention._tiles
    monkeypatch.setattr(grouped_attention, "_tiles", lambda mask, count: shifted(mask, count).roll(1, dims=2))
    assert difference(llama(groups=2), RAGGED, tree, monkeypatch) > 1e-3


def test_sliding_windows_have_masks_of_their_own(monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **window, initializer_range=0.2)).double().eval()
    assert reads_keys_once(model)
    assert difference(model, [list(range(1, 40))] * 3, CHAIN, monkeypatch) < EXACT


def test_a_call_uses_it_and_leaves_the_configuration_as_it_was(monkeypatch):
    model = llama(groups=2)
    before = model.config.to_json_string(use_diff=False)
    names: list[str] = []
    inner = model.model.layers[0].forward

    def seen(*arguments: Any, **named: Any) -> Any:
        names.append(model.config._attn_implementation)
        if named["past_key_values"].get_seq_length() > 200:
            raise RuntimeError("too long")
        return inner(*arguments, **named)

    monkeypatch.setattr(model.model.layers[0], "forward", seen)
    lm = CachedLM(model, name="t")
    lm.begin([[1] * 202])
    with pytest.raises(RuntimeError, match="too long"):
        lm.step([1])
    assert names == [NAME] * 2
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_json_string(use_diff=False) == before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attentions_and_unshared_heads_stay_as_they_are(attention):
    groups = 2 if attention == "eager" else HEADS
    assert not reads_keys_once(llama(groups=groups, attn_implementation=attention))
