"""One call over a tree gives every node the logits of its path read alone, for architectures with different masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import random_llama

EXACT = 1e-12
TREE = [-1, -1, 0, 0, 1, 2, 4, 5]
TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]
PROMPTS = [[1, 2, 3, 4], [9, 8, 7, 6, 5, 4, 3]]


def architectures() -> dict[str, Any]:
    size = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    spread = {"initializer_range": 0.2}
    return {
        "llama": lambda: random_llama(),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**size, **heads, **spread, head_dim=16)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, **spread)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**size, **heads, **spread, head_dim=16)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(**size, num_attention_heads=2, max_position_embeddings=512, **spread)
        ),
    }


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = architectures()[name]().double().eval()
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, special, None)
    assert model.config._attn_implementation == "sdpa"
    return model


def path_of(node: int, parents: list[int]) -> list[int]:
    return [] if node < 0 else [*path_of(parents[node], parents), node]


def error(model: Any, text: list[int], seen: Any, parents: list[int], tokens: list[int]) -> float:
    """Return the largest difference of a node's logits and final state from those of its path read alone."""
    worst = 0.0
    for node in range(len(tokens)):
        alone = model(torch.tensor([[*text, *(tokens[i] for i in path_of(node, parents))]]), output_hidden_states=True)
        worst = max(worst, float((seen.logits_BTV[0, node] - alone.logits[0, -1]).abs().max()))
        worst = max(worst, float((seen.final_BTD[0, node] - alone.hidden_states[-1][0, -1]).abs().max()))
    return worst


@pytest.mark.parametrize("name", list(architectures()))
@torch.no_grad()
def test_a_node_attends_only_to_its_path_even_after_a_gather(name):
    model = build(name)
    lm = CachedLM(model, name=name)
    lm.begin([text[:-1] for text in PROMPTS])
    texts = [list(text) for text in PROMPTS]
    kept = [[0, 1, 3, 6], [0, 2, 5, 7]]  # nodes of root + tree: paths that are not prefixes of the call
    for _ in range(3):
        # Node 0 is the root, the last committed token; the tree is below it.
        parents = [-1, *(parent + 1 for parent in TREE)]
        nodes = [[text[-1], *TOKENS] for text in texts]
        needs = TargetNeeds(logits=True, final=True)
        seen = lm.forward(nodes, parents=[parents, parents], needs=needs)
        for text, output, tokens in zip(texts, seen, nodes, strict=True):
            assert error(model, text[:-1], output, parents, tokens) < EXACT
        lm.keep(kept)
        for row, (text, path, tokens) in enumerate(zip(texts, kept, nodes, strict=True)):
            text += [*(tokens[node] for node in path[1:]), 20 + row]
        kept.reverse()


@torch.no_grad()
def test_control_a_tree_read_as_a_chain_gives_other_logits():
    model = build("llama")
    lm = CachedLM(model, name="llama")
    lm.begin([PROMPTS[0]])
    seen = lm.forward([TOKENS], needs=TargetNeeds(logits=True, final=True))[0]
    assert error(model, PROMPTS[0], seen, TREE, TOKENS) > 1e-2


@torch.no_grad()
def test_a_sliding_window_is_exact_below_its_width_and_refuses_trees_from_there_on():
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=16,
            initializer_range=0.2,
        )
    )
    model = model.double().eval()
    lm = CachedLM(model, name="target")
    lm.begin([PROMPTS[0]])
    seen = lm.forward([TOKENS], parents=[TREE], needs=TargetNeeds(logits=True, final=True))[0]
    assert error(model, PROMPTS[0], seen, TREE, TOKENS) < EXACT
    lm.keep([[0, 2, 5, 7]])
    with pytest.raises(CheckpointError, match="sliding window of 16"):
        lm.forward([TOKENS], parents=[TREE])
