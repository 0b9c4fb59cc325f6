"""Layers in parallel: the logits of their definition, bit for bit those of ordinary calls in groups of one, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm import decoding
from drafttrain.drafters.causal_lm.decoding import DecodingLM, decoding_lm
from drafttrain.drafters.causal_lm.layer_parallel import LayerParallelLM
from drafttrain.target_model.cached_lm import CachedLM
from tests.drafters.test_causal_lm_decoding import model, texts

COMMITTED, DRAFTED = texts([9, 4], 1)
TREE = [3, 3, 4]
"""Parents of three nodes after four pending tokens: two children of the last one, and a grandchild."""


@torch.no_grad()
def logits(lm: DecodingLM, *, parents: Sequence[int] | None = None) -> list[Tensor]:
    """Return logits_BTV of two committed tokens and of four draft tokens, which are read one by one, or as a tree at once."""
    lm.begin([COMMITTED[:-2]])
    calls = [COMMITTED[-2:], *([token] for token in DRAFTED)]
    options: list[dict[str, Any]] = [{}] * len(calls)
    if parents is not None:
        calls, options = [COMMITTED[-4:], DRAFTED[: len(parents)]], [{}, {"parents": [parents]}]
        lm.begin([COMMITTED[:-4]])
    found = [lm.forward([call], **one)[0].logits_BTV for call, one in zip(calls, options, strict=True)]
    return [one for one in found if one is not None]


@torch.no_grad()
def by_definition(model: Any, groups: Sequence[Sequence[int]], *, feed_forward: str = "in order") -> list[Tensor]:
    """Return the logits of the draft tokens with transformers' modules and cache: committed tokens are read as they are.

    Args:
        feed_forward: `in order`; or `of the group`: each reads the states that enter the group, as its attention does.
    """
    cache, found = DynamicCache(), []
    model(torch.tensor([COMMITTED]), past_key_values=cache)
    trunk = model.model
    for place, token in enumerate(DRAFTED, start=len(COMMITTED)):
        states_BND = trunk.embed_tokens(torch.tensor([[token]]))
        angles = trunk.rotary_emb(states_BND, torch.tensor([[place]]))
        for group in groups:
            layers, entering_BND = [trunk.layers[index] for index in group], states_BND
            attended = [
                layer.self_attn(
                    layer.input_layernorm(entering_BND),
                    position_embeddings=angles,
                    attention_mask=None,
                    past_key_values=cache,
                )[0]
                for layer in layers
            ]
            for layer, added_BND in zip(layers, attended, strict=True):
                states_BND = states_BND + added_BND
                reads = states_BND if feed_forward == "in order" else entering_BND + added_BND
                states_BND = states_BND + layer.mlp(layer.post_attention_layernorm(reads))
        found.append(model.lm_head(trunk.norm(states_BND)))
    return found


def worst(ours: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(ours, others, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (2, [[0], [1, 2], [3, 4], [5], [6]]),
        (4, [[0], [1, 2, 3, 4], [5], [6]]),
        (8, [[0], [1, 2, 3, 4, 5], [6]]),
    ],
)
def test_draft_tokens_have_the_logits_of_the_definition(kind: str, size: int, groups: list[list[int]]) -> None:
    drafter = model(kind, num_hidden_layers=7)
    found = logits(LayerParallelLM(drafter, size, name="drafter"))
    assert worst(found[1:], by_definition(drafter, groups)) < 1e-12
    # Committed tokens are read by an ordinary call.
    assert worst(found[:1], logits(DecodingLM(drafter, name="drafter"))[:1]) == 0
    # Controls: other groups, feed-forward blocks on the states that enter the group, and ordinary calls.
    inner = [[0, 1], *([number] for number in range(2, 7))]
    others = [
        by_definition(drafter, inner),
        by_definition(drafter, groups, feed_forward="of the group"),
        by_definition(drafter, [[number] for number in range(7)]),
    ]
    for other in others:
        assert worst(found[1:], other) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parents", [None, TREE])
def test_in_groups_of_one_the_logits_are_those_of_ordinary_calls_bit_for_bit(
    dtype: torch.dtype, parents: list[int] | None
) -> None:
    drafter = model(num_hidden_layers=5, dtype=dtype)
    ordinary = logits(DecodingLM(drafter, name="drafter"), parents=parents)
    one, two = (logits(LayerParallelLM(drafter, size, name="drafter"), parents=parents) for size in (1, 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, ordinary, strict=True))
    # Control: in groups of two draft tokens have others.
    assert torch.equal(two[0], ordinary[0])
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(two[1:], ordinary[1:], strict=True))


@torch.no_grad()
def test_nodes_of_a_tree_are_drafted_as_their_paths_alone() -> None:
    drafter = model(num_hidden_layers=6)
    lm = LayerParallelLM(drafter, 4, name="drafter")
    tree = logits(lm, parents=TREE)[1]
    for path in ([0], [1], [0, 2]):
        lm.begin([COMMITTED[:-4]])
        lm.forward([COMMITTED[-4:]])
        (alone,) = lm.forward([[DRAFTED[node] for node in path]])
        assert alone.logits_BTV is not None
        torch.testing.assert_close(tree[:, path[-1]], alone.logits_BTV[:, -1], rtol=1e-12, atol=1e-12)


def test_a_model_whose_layers_cannot_run_in_parallel_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=6))
    cases = [
        (gpt2, "must be a LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, got GPT2LMHeadModel"),
        (model(num_hidden_layers=3), "at least 4 layers, got 3"),
        (model(num_hidden_layers=4, hidden_act="gelu"), "is not that of a plain Llama"),
    ]
    for one, why in cases:
        with pytest.raises(CheckpointError, match=rf"eval\.layer_parallel_size: .*{why}.*Set 1"):
            LayerParallelLM(one, 2, name="drafter")


def test_a_large_model_drafts_with_layers_in_parallel_though_it_is_read_as_transformers_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = model(num_hidden_layers=4)
    monkeypatch.setattr(decoding, "MOST_WEIGHTS", 100)
    assert isinstance(decoding_lm(drafter), CachedLM)
    assert logits(LayerParallelLM(drafter, 2, name="drafter"))
