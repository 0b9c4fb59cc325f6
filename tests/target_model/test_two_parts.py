"""A target run in two parts: the same logits, one cache, every byte in the ledger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config

from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent
from drafttrain.core.proposals import LayerState
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model import cached_lm
from drafttrain.target_model.anatomy import blocks, final_norm
from drafttrain.target_model.block_range import block_range
from drafttrain.target_model.cached_lm import CachedLM
from tests.target_model.test_target import ARCHITECTURES, SMALL

# Gemma 2 alternates layers with and without a sliding window: a block must keep its number when others are skipped.
MODELS = ARCHITECTURES | {
    "gemma2": Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16, sliding_window=32)
}
PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4, 5]]
NODES = [[20, 21, 22], [23], [24, 25]]


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name]).eval().double()


def one_by_one(lm: CachedLM, nodes: list[list[int]]) -> list[LayerState]:
    """Run the first blocks over the nodes like a drafter: one node per call, without chains that have ended."""
    rows: list[list[torch.Tensor]] = [[] for _ in nodes]
    for place in range(max(map(len, nodes))):
        states = lm.run_first_blocks([chain[place : place + 1] for chain in nodes])
        for row, state in zip(rows, states, strict=True):
            row.extend(state.hidden_ND)
    assert lm.split is not None
    return [LayerState(lm.split, torch.stack(row)) for row in rows]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [1, 2])
def test_verifying_from_stored_states_gives_the_logits_of_a_whole_call(name, layer):
    """In a ragged batch and alone, also after a partial acceptance. Hidden states on the way are equal too."""
    model = random_model(name)
    # Gemma 2's attention has its softmax in float32, whose rounding depends on the processor.
    atol = 1e-5 if name == "gemma2" else 1e-12
    for prompts, nodes in [(PROMPTS, NODES), (PROMPTS[:1], NODES[:1])]:
        parts, whole = CachedLM(model, name="target"), CachedLM(model, name="target")
        parts.split_at(layer)
        needs = TargetNeeds(logits=True, hidden=(layer, 3), final=True)
        for lm in (parts, whole):
            lm.begin(prompts)
        for accepted in ([[0, 1], [0], [0]], [[0], [0], [0, 1]]):
            ours = parts.forward(nodes, needs=needs, resume=one_by_one(parts, nodes))
            theirs = whole.forward(nodes, needs=needs)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a.logits_BTV, b.logits_BTV, rtol=0, atol=atol)
                assert torch.allclose(a.final_BTD, b.final_BTD, rtol=0, atol=atol)
                for index in (layer, 3):
                    assert torch.allclose(a.hidden_BTD[index], b.hidden_BTD[index], rtol=0, atol=atol)
            kept = accepted[: len(prompts)] if len(prompts) > 1 else [[0]]
            for lm in (parts, whole):
                lm.keep(kept)
            assert parts.lengths == whole.lengths
            same_caches(parts, whole, atol=atol)


def same_caches(parts: CachedLM, whole: CachedLM, *, atol: float = 1e-12) -> None:
    """All layers of both have the same keys and values for the same tokens."""
    for ours, theirs in zip(parts.cache.hf.layers, whole.cache.hf.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for row, length in enumerate(whole.lengths):
            assert torch.allclose(ours.keys[row, :, :length], theirs.keys[row, :, :length], rtol=0, atol=atol)
            assert torch.allclose(ours.values[row, :, :length], theirs.values[row, :, :length], rtol=0, atol=atol)


def test_sequences_can_be_dropped_between_rounds():
    model = random_model("llama")
    parts, alone = CachedLM(model, name="target"), CachedLM(model, name="target")
    parts.split_at(1)
    parts.begin(PROMPTS)
    parts.forward(NODES, resume=one_by_one(parts, NODES))
    parts.keep([[0], [0], [0, 1]])
    parts.drop([2])
    (ours,) = parts.forward([[30, 31]], resume=one_by_one(parts, [[30, 31]]))
    alone.begin([[*PROMPTS[2], *NODES[2]]])
    (theirs,) = alone.forward([[30, 31]])
    assert torch.allclose(ours.logits_BTV, theirs.logits_BTV, rtol=0, atol=1e-12)


def test_the_bytes_of_two_parts_are_those_of_one_call():
    """Both parts look up embedding rows; nothing else is read twice."""
    model = random_model("llama")
    events: list[ForwardEvent] = []
    lm = CachedLM(model, name="target", listener=events.append)
    lm.split_at(2)
    assert not events, "trying whether it works is no forward of a round"
    lm.begin([PROMPTS[0]])
    lm.forward([[20]], resume=one_by_one(lm, [[20]]))
    prefill, first, rest = events
    assert [e.model for e in events] == ["target", "target's first blocks", "target"]
    assert [e.shape.num_layers for e in events] == [3, 2, 1]
    assert [e.shape.context for e in events] == [0, 5, 5]
    embedding_row = 32 * 8
    assert first.bytes_read + rest.bytes_read == rest.plain_bytes + embedding_row
    block = sum(p.numel() * 8 for p in blocks(model)[0].parameters())
    cached = 2 * 2 * 16 * 8  # keys and values of two heads, by layer and token
    assert first.bytes_read == 2 * (block + 6 * cached) + embedding_row
    assert prefill.bytes_read == 3 * (block + 5 * cached) + 5 * embedding_row + 32 * 8


def test_blocks_outside_the_range_are_skipped_and_restored():
    model = random_model("llama")
    before = [module.__dict__.get("forward") for module in (*blocks(model), final_norm(model))]
    tokens_BT = torch.tensor([[1, 2, 3]])
    with block_range(model, range(1)):
        state_BTD = model.model(tokens_BT, use_cache=False).last_hidden_state
    with pytest.raises(IndexError), block_range(model, range(1)):
        model.model(tokens_BT + 1000, use_cache=False)
    assert [module.__dict__.get("forward") for module in (*blocks(model), final_norm(model))] == before
    tapped = model(tokens_BT, output_hidden_states=True, use_cache=False).hidden_states[1]
    torch.testing.assert_close(state_BTD, tapped, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_a_split_outside_the_model_is_refused(layer):
    with pytest.raises(CheckpointError, match=rf"split at 1\.\.2 \(3 layers\), got {layer}"):
        CachedLM(random_model("llama"), name="target").split_at(layer)


def test_a_model_that_cannot_be_run_in_two_parts_is_refused(monkeypatch):
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=2)).eval()
    with pytest.raises(
        CheckpointError, match=r"BloomForCausalLM cannot be run in two parts at block 1: .*position_ids"
    ):
        CachedLM(bloom, name="target").split_at(1)
    # Control of the check itself: states lost between the parts are noticed.
    monkeypatch.setattr(cached_lm, "_stacked", lambda rows: rows and torch.stack(list(rows)) * 0.9)
    with pytest.raises(CheckpointError, match="gives other logits when it is run in two parts"):
        CachedLM(random_model("llama"), name="target").split_at(1)


def test_a_call_continues_all_sequences_or_none():
    lm = CachedLM(random_model("llama"), name="target")
    lm.split_at(1)
    lm.begin(PROMPTS)
    states = one_by_one(lm, NODES)
    with pytest.raises(CheckpointError, match="all of its sequences"):
        lm.forward(NODES, resume=[states[0], None, states[2]])
    with pytest.raises(CheckpointError, match="hidden state 0 is not available"):
        lm.forward(NODES, needs=TargetNeeds(hidden=(0,)), resume=states)
