"""Evaluation prompts in the training text: every question of a conversation is compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drafttrain.config.load import load_recipe
from drafttrain.eval.prompts import read_prompts
from drafttrain.pipeline.data import contaminated_prompts, training_data
from drafttrain.pipeline.drafter_run import DrafterRun
from tests.conftest import byte_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }} says>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant says>{% endif %}"
RECIPE = """
name: tiny
target: {model: target}
drafter: {kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}
loss: {kind: ce}
data: {max_length: 200, sources: [{kind: jsonl, path: data.jsonl}]}
train: {max_steps: 2, warmup_steps: 1, loggers: [csv]}
eval: {prompts: test.jsonl, validation_prompts: validation.jsonl}
"""
QUESTIONS = {
    "first": ["Tell me about the deep blue sea.", "And of its colour?"],
    "second": ["Name three birds.", "Now tell me about the deep blue sea!"],
    "neither": ["Name three birds.", "Which of them can swim?"],
    "frame only": ["Why?", "How?"],
}


@pytest.fixture
def run(tmp_path: Path, save_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> DrafterRun:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(save_llama(num_layers=1), tmp_path / "target")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "target")
    chat = [
        {"role": "user", "content": "He said: tell me about the deep blue sea."},
        {"role": "assistant", "content": "No"},
    ]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": chat}))
    asked = [{"id": id, "turns": turns} for id, turns in QUESTIONS.items()]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "something else"}))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return DrafterRun(load_recipe("r.yaml"), tmp_path / "run")


def test_a_conversation_is_left_out_where_any_of_its_questions_is_in_the_training_text(run: DrafterRun) -> None:
    training_data(run)
    dropped = contaminated_prompts(run, "test.jsonl")
    assert dropped == ["first", "second"]
    kept = read_prompts("test.jsonl", run.tokenizer, prompt_tokens=None, dropped=dropped)
    assert [prompt.id for prompt in kept] == ["neither", "frame only"]


def test_what_an_earlier_version_compared_is_compared_again(run: DrafterRun) -> None:
    training_data(run)
    held = json.loads(run.folder.contamination.read_text())
    run.folder.contamination.write_text(json.dumps(held | {"format": 2, "dropped": []}))
    assert contaminated_prompts(run, "test.jsonl") == ["first", "second"]
