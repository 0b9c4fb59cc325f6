"""transformers' generate as a baseline writes the text of plain decoding, whatever the model's generation config is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from drafttrain.checkpoint import About, write_about
from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.generate import generate
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.eval.result import AtTemperature
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, decode
from tests.marks import long

NEW = 24


@pytest.fixture
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


def plain(target: Target) -> list[Generation]:
    return [decode(target, NoDraft(), prompts=[prompt], new=NEW)[0] for prompt in PROMPTS]


CONFIGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(1, 200))},
    {"begin_suppress_tokens": list(range(1, 250))},
    {"bad_words_ids": [[i] for i in range(1, 200)]},
    {"sequence_bias": [[[7], 50.0]]},
    {"forced_bos_token_id": 9},
    {"forced_eos_token_id": 9},
    {"min_new_tokens": NEW},
    {"min_length": 60},
    {"exponential_decay_length_penalty": [2, 9.0]},
    {"num_beams": 3},
    {"do_sample": True, "temperature": 3.0},
    {"max_length": 5},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"return_dict_in_generate": True},
]


@pytest.mark.parametrize(
    "config",
    [one if place % 4 == 0 else long(one) for place, one in enumerate(CONFIGS)],
    ids=lambda one: next(iter(one)),
)
def test_it_writes_the_text_of_plain_decoding_whatever_the_generation_config_is(target, config):
    own = GenerationConfig(eos_token_id=[0], pad_token_id=0, **config)
    target.model.generation_config = own
    for prompt, expected in zip(PROMPTS, plain(target), strict=True):
        found = generate(prompt, target, max_new_tokens=NEW)
        assert found.tokens == expected.tokens
        assert found.seconds > 0
    assert target.model.generation_config is own, "the target is as it was"


def test_it_stops_where_plain_decoding_stops(target):
    whole = plain(target)
    ending = whole[0].tokens[5]
    target.model.generation_config = GenerationConfig(eos_token_id=[ending, 256], pad_token_id=0)
    ends = Target(target.model, target.tokenizer, name="ends early", fingerprint="")
    shorter = plain(ends)
    assert [generate(p, ends, max_new_tokens=NEW).tokens for p in PROMPTS] == [one.tokens for one in shorter]
    assert len(shorter[0].tokens) <= 6


def evaluated(target: Target, folder: Path) -> AtTemperature:
    Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer).save(folder)
    write_about(folder, About("medusa", target.name, "", target.tokenizer_fingerprint, target.vocab_size, 0))
    settings = EvalSettings(max_new_tokens=NEW, temperatures=[0.0], speed_prompts=3, repetition_ngram=0)
    return evaluate({"drafter": folder}, target, PROMPTS, settings).temperatures[0]


def test_it_is_warmed_up_like_the_arms(target, tmp_path, monkeypatch):
    called: list[int] = []
    own = target.model.generate
    monkeypatch.setattr(target.model, "generate", lambda tokens, **words: called.append(1) or own(tokens, **words))
    same = evaluated(target, tmp_path).plain.same_prompts
    assert same.num_prompts == 3
    assert len(called) == 1 + 3


def test_an_evaluation_reports_that_generate_writes_the_same_text(target, tmp_path):
    target.model.generation_config = GenerationConfig(eos_token_id=[0], pad_token_id=0, repetition_penalty=1.8)
    same = evaluated(target, tmp_path).plain.same_prompts
    assert (same.transformers_generate_equal, same.transformers_generate_comparable) == (3, True)


def test_a_different_text_is_counted_by_its_own_tokens_and_is_no_baseline(target, tmp_path):
    """A model class can have its own logits processors, which no configuration turns off."""
    kept = [*range(200, 257)]
    target.model._get_logits_processor = lambda *_, **__: LogitsProcessorList(
        [SuppressTokensLogitsProcessor(list(range(1, 200)))]
    )
    target.model.generation_config = GenerationConfig(eos_token_id=kept, pad_token_id=0)
    part = evaluated(target, tmp_path)
    same = part.plain.same_prompts
    assert not same.transformers_generate_comparable
    assert part.drafters["drafter"].speedup.baseline == "plain decoding, same engine"
    found = generate(PROMPTS[0], target, max_new_tokens=NEW)
    assert len(found.tokens) == 1, "it ends at once"


def test_without_end_of_text_tokens_it_writes_to_the_limit(target):
    target.model.generation_config = GenerationConfig(pad_token_id=0)
    object.__setattr__(target.tokenizer, "eos_token", None)
    prompt = Prompt("a", [1, 2, 3])
    assert len(generate(prompt, target, max_new_tokens=NEW).tokens) == NEW
