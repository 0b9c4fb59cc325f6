"""Validation reads a bounded number of tokens at once, with the same figures as one text at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.texts import Record, Sampling
from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.annotate.states import states_of
from drafttrain.data_gen.groups import TOKENS_AT_ONCE
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.replay import Text, replay_rows
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import noisy

LENGTHS = [300, 12, 290, 7, 40, 280, 33, 9]
"""Tokens of the prompts, each followed by 10 new tokens."""


@pytest.fixture
def target() -> Target:
    return Target(random_llama(hidden_size=16).double(), byte_tokenizer(), name="t", fingerprint="")


def texts() -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, 257, (length + 10,), generator=generator).tolist() for length in LENGTHS]
    return [Text(str(i), tokens[:-10], tokens[-10:]) for i, tokens in enumerate(drawn)]


def watched(model: Any) -> list[int]:
    """Return a list that collects the tokens of each later call of a model, padding included."""
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    return read


def test_figures_equal_those_of_one_text_at_a_time(target: Target) -> None:
    drafter = CausalLMDrafter(random_llama(seed=3, num_layers=1, hidden_size=16).double())
    together = replay_rows(target, drafter, texts(), Sampling(1.0))
    for text, row in zip(texts(), together, strict=True):
        (alone,) = replay_rows(target, drafter, [text], Sampling(1.0))
        assert row.id == alone.id == text.id
        np.testing.assert_allclose(row.accepted_TK, alone.accepted_TK, rtol=0, atol=1e-10)
        np.testing.assert_allclose(row.acceptance_T, alone.acceptance_T, rtol=0, atol=1e-10)


def test_validation_of_long_texts_reads_no_more_tokens_than_of_short_ones() -> None:
    model = random_llama(num_layers=1, hidden_size=8)
    target, drafter = Target(model, byte_tokenizer(), name="t", fingerprint=""), CausalLMDrafter(noisy(model, 0.1))
    read = watched(target.model), watched(drafter.model)
    long = [Text(str(number), [1 + number] * 1090, [5, 6]) for number in range(17)]
    replay_rows(target, drafter, long, Sampling())
    for calls in read:
        assert max(calls) <= TOKENS_AT_ONCE < sum(calls)
        assert len(calls) < len(long), "texts are read together where there is room"


def test_states_of_long_texts_are_read_in_bounded_calls() -> None:
    """As the annotators read them, in the order of the texts."""
    model = random_llama(num_layers=1, hidden_size=8)
    frozen = Frozen(Target(model, byte_tokenizer(), name="t", fingerprint=""), CausalLMDrafter(model), 0)
    texts = [[1 + number] * length for number, length in enumerate([300, 40, 299] * 28)]
    records = [Record(str(number), text, [True] * len(text)) for number, text in enumerate(texts)]
    read = watched(model)
    states = states_of(records, frozen)
    assert max(read) <= TOKENS_AT_ONCE < sum(read)
    assert [len(state) for state in states] == [len(text) for text in texts]
    torch.testing.assert_close(states[1], states_of(records[1:2], frozen)[0], rtol=0, atol=1e-5)
