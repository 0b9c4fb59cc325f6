"""After every round, logits from the cache equal those of the whole text read anew: single tokens, chains, trees, dropped rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.grouped_attention import reads_keys_once

EXACT = 1e-12
TREE = [-1, 0, 0, 1, 2, 2]
PATHS = [[0, 2, 5], [0, 1], [0], [0, 2, 4]]
EQUAL = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
RAGGED = [[1, 2, 3, 4], [5, 6], [7], [8, 9, 10, 11, 12, 13]]


def grouped(*, shared: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=shared, initializer_range=0.2)
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def error(model: Any, texts: list[list[int]], logits: list[torch.Tensor]) -> float:
    """Return the largest difference of logits from those after the last token of each text, read alone."""
    fresh = [model(torch.tensor([text])).logits[0, -1] for text in texts]
    return max(float((one - other).abs().max()) for one, other in zip(logits, fresh, strict=True))


def play(lm: CachedLM, prompts: list[list[int]], paths: list[list[int]]) -> float:
    """Return the largest error over rounds of single tokens, a tree, a chain, and fewer sequences."""
    model, texts, worst = lm.model, [list(prompt) for prompt in prompts], 0.0
    lm.begin(texts)
    for number in range(3):
        tokens = [20 + 10 * number + row for row in range(len(texts))]
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        worst = max(worst, error(model, texts, list(lm.step(tokens))))
        nodes = [[50 + number * 7 + row, 61, 62, 63, 64, 65] for row in range(len(texts))]
        seen = lm.forward(nodes, parents=[TREE] * len(texts))
        lm.keep(paths[: len(texts)])
        texts = [[*t, *(n[i] for i in path)] for t, n, path in zip(texts, nodes, paths, strict=False)]
        last = [one.logits_BTV[0, path[-1]] for one, path in zip(seen, paths, strict=False)]
        worst = max(worst, error(model, texts, last))
        chains = [[30, 31, 32]] * len(texts)
        seen = lm.forward(chains)
        lm.keep([[0, 1]] * len(texts))
        texts = [[*text, 30, 31] for text in texts]
        worst = max(worst, error(model, texts, [one.logits_BTV[0, 1] for one in seen]))
        left = list(range(len(texts)))[::-1][: len(texts) - 1]
        lm.drop(left)
        texts = [texts[row] for row in left]
        paths = [paths[row] for row in left]
    return worst


@pytest.mark.parametrize("prompts", [EQUAL, RAGGED, EQUAL[:1] * 4])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_every_round_equals_a_fresh_prefill(prompts, shared):
    model = grouped(shared=shared)
    assert reads_keys_once(model) == (shared < 4)
    assert play(CachedLM(model, name="t"), prompts, PATHS) < EXACT


def test_control_another_path_than_the_text_is_seen():
    lm = CachedLM(grouped(), name="t")
    lm.begin(EQUAL[:1])
    lm.forward([[50, 61, 62, 63, 64, 65]], parents=[TREE])
    lm.keep([[0, 1, 3]])
    text = [*EQUAL[0], 50, 62, 65, 20]  # of nodes 0, 2 and 5
    assert error(lm.model, [text], list(lm.step([20]))) > 1e-3
