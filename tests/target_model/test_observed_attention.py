"""Observed attention is the model's own, and observing changes nothing.

H = heads, N = queries, P = cached tokens
"""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.observed_attention import attention_to
from tests.conftest import random_llama

TOKENS = [7, 3, 3, 9, 11, 2, 5, 8, 7, 3, 12, 4]


@pytest.mark.parametrize("after", [8, 5, 0])
def test_it_is_what_transformers_returns(after):
    model = random_llama(num_layers=3).double()
    lm = CachedLM(model, name="target")
    lm.begin([TOKENS[:8]])
    found = attention_to(lm, TOKENS[after:], after=after, summary=lambda weights: weights)
    model.set_attn_implementation("eager")
    own = model(torch.tensor([TOKENS]), output_attentions=True).attentions
    assert len(found) == 3
    for weights_HNP, own_1HNC in zip(found, own, strict=True):
        torch.testing.assert_close(weights_HNP.double(), own_1HNC[0, :, after:, :8], atol=1e-6, rtol=0)
        assert not torch.allclose(weights_HNP.double(), own_1HNC[0, :, after:, 1:9], atol=1e-3), "control: other keys"


def test_observing_leaves_the_cache_as_it_is():
    lms = [CachedLM(random_llama(), name="target") for _ in range(2)]
    for lm in lms:
        lm.begin([TOKENS[:8]])
    attention_to(lms[0], TOKENS[4:], after=4, summary=lambda weights: weights.sum())
    (observed,), (not_observed,) = (lm.forward([TOKENS[8:]]) for lm in lms)
    assert torch.equal(observed.logits_BTV, not_observed.logits_BTV)


def test_an_attention_that_cannot_be_observed_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=32)).eval()
    model._supports_attention_backend = False
    lm = CachedLM(model, name="target")
    lm.begin([TOKENS])
    with pytest.raises(CheckpointError, match="target: GPT2LMHeadModel does not let its attention be observed"):
        attention_to(lm, [1], after=len(TOKENS), summary=lambda weights: weights)
