"""The speed of an engine: tokens over its own seconds, beside the evaluator's; what is timed ends where the text ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafttrain.eval.parity import Parity
from drafttrain.eval.result import Speedup
from drafttrain.eval.speed import Speed
from drafttrain.serving.card import ORIGIN, with_engines
from drafttrain.serving.engines import DecodedPrompt, Job, Use, engine_of
from drafttrain.serving.engines.transformers_worker import answer_to
from drafttrain.serving.reference import up_to_end
from drafttrain.serving.speed import compared
from drafttrain.target_model.gguf_folder import MADE_FROM
from tests.serving.test_card import comparison

EVALUATOR = Speed(Speedup(1.6, 1.5, 1.7, 8, baseline="plain decoding"), 40.0, 25.0, None, 2.0, None)
NUM_PROMPTS = 8
EQUAL = Parity(True, NUM_PROMPTS, NUM_PROMPTS, 0, 0, [], "exact: 8 of 8 outputs equal")


def run(seconds: float, *, num_accepted: int = 0, waits: float = 0.5) -> list[DecodedPrompt]:
    """Return a process that wrote ten tokens for every prompt, each prompt a little slower than the last."""
    return [
        DecodedPrompt(
            tokens=[1] * 10,
            num_drafts=5 if num_accepted else 0,
            num_accepted=num_accepted,
            seconds=waits + seconds * (1 + number / 100),
            prompt_seconds=waits,
            cpu_seconds=seconds,
        )
        for number in range(NUM_PROMPTS)
    ]


def test_the_speed_up_is_tokens_over_seconds_of_all_processes():
    found = compared([run(1.0, num_accepted=5), run(3.0, num_accepted=5)], [run(4.0), run(4.0)], EVALUATOR, EQUAL, 3)
    assert found.of_cpu.value == pytest.approx(2.0)
    assert found.after_prompt.value == pytest.approx(2.0)
    assert found.engine.speedup.value < found.after_prompt.value
    assert found.engine.speedup.value == pytest.approx(found.engine.with_drafter / found.engine.without_drafter)
    assert found.engine.block_efficiency == 2.0
    assert (found.num_pairs, found.num_prompts) == (2, NUM_PROMPTS)
    slower = compared([run(1.0, num_accepted=5), run(3.5, num_accepted=5)], [run(4.0), run(4.0)], EVALUATOR, EQUAL, 3)
    assert slower.engine.speedup.value < found.engine.speedup.value


@pytest.mark.parametrize(("text", "length"), [([5, 6, 2, 7], 3), ([5, 6, 7], 3), ([2], 1), ([], 0)])
def test_a_text_is_timed_up_to_the_token_that_ends_it(text, length):
    assert len(up_to_end(text, frozenset([2, 3]))) == length


def test_the_card_and_the_engine_file_show_both_speeds():
    found = compared([run(1.0, num_accepted=5)], [run(2.0)], EVALUATOR, EQUAL, 3)
    stored = json.loads(json.dumps(found.json()))
    card = with_engines(f"# A\n\n{ORIGIN}\n", [comparison(speed=stored)])
    assert f"| greedy tokens/s with the drafter | {found.engine.with_drafter:.1f} | 40.0 |" in card
    assert f"| speed-up | {found.engine.speedup.text()} | 1.60 [1.50, 1.70] |" in card
    assert "without it wrote: exact: 8 of 8 outputs equal." in card
    assert "tokens/s with the drafter" not in with_engines(card, [comparison()])


def test_a_worker_times_each_prompt_and_writes_as_many_tokens_as_asked(target):
    job = Job(Path(target.name), [[5, 6], [7, 8, 9]], 6, [0.0], "float32", 64, lengths=[4, 6], as_served=True)
    engine = engine_of("transformers")
    ((first, second),) = engine.decoded(answer_to(engine.request(job, None)))
    assert (len(first.tokens), len(second.tokens)) == (4, 6)
    for one in (first, second):
        assert 0 < one.prompt_seconds < one.seconds
        assert one.cpu_seconds > 0


def test_llama_cpp_serves_the_file_that_a_target_was_made_from_only_for_its_speed(tmp_path, monkeypatch):
    (tmp_path / MADE_FROM).write_text(json.dumps({"file": "/models/target.gguf"}))
    engine = engine_of("llama.cpp")
    job = Job(tmp_path, [[5]], 4, [0.0], "bfloat16", 64, as_served=True)
    request = engine.request(job, Use("drafter", "causal_lm", 3, "greedy"))
    assert (request["target"], request["dtype"], request["warm_up"]) == ("/models/target.gguf", "float16", True)
