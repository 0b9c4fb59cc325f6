"""Sequences of different lengths that end at different times equal sequences decoded alone."""

from __future__ import annotations

import torch

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import byte_tokenizer, random_llama


def test_texts_of_a_ragged_batch_equal_those_generated_alone():
    model = random_llama(hidden_size=16).double()
    target = Target(model, byte_tokenizer(), name="t", fingerprint="")
    tasks = [Task(str(i), list(range(1 + i, 3 + 4 * i)), Sampling()) for i in range(5)]
    alone = [continuations([task], target, max_new_tokens=24, seed=0)[0] for task in tasks]
    # Two of the texts end early, at a token that no other text contains so early.
    model.generation_config.eos_token_id = [alone[0][5], alone[3][2]]
    target = Target(model, byte_tokenizer(), name="t", fingerprint="")
    ended = [continuations([task], target, max_new_tokens=24, seed=0)[0] for task in tasks]
    assert len({len(text) for text in ended}) > 2, "they end at different times"
    assert continuations(tasks, target, max_new_tokens=24, seed=0) == ended


def test_a_sequence_dropped_between_commits_leaves_the_others_caches_whole():
    model = random_llama(hidden_size=16).double()
    lm = CachedLM(model, name="t")
    texts = [[1, 2], [3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13]]
    lm.begin(texts)
    for token in (20, 21, 22):
        lm.forward([[token], [token], [token]])
        lm.cache.commit()
    lm.drop([0, 2])
    for row, text in enumerate([[1, 2, 20, 21, 22], [10, 11, 12, 13, 20, 21, 22]]):
        with torch.no_grad():
            fresh = model(torch.tensor([text]), use_cache=True).past_key_values
        for ours, theirs in zip(lm.cache.hf.layers, fresh.layers, strict=True):
            torch.testing.assert_close(ours.keys[row : row + 1, :, : len(text)], theirs.keys, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours.values[row : row + 1, :, : len(text)], theirs.values, rtol=0, atol=1e-12)
