"""An interrupted evaluation continues after the last prompts that all arms decoded, and gives the figures of a whole one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafttrain.checkpoint import About, write_about
from drafttrain.drafters.medusa.module import Medusa, MedusaSettings
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.proposers.aded import AdedSettings
from drafttrain.eval.proposers.rasd import RasdSettings
from drafttrain.eval.result import AtTemperature
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.unfinished import Unfinished, made_with
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS

SETTINGS = EvalSettings(max_new_tokens=8, temperatures=[0.0], speed_prompts=1, replay_lengths=[1])
MARKED_SECONDS = 1000.0


@pytest.fixture
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="T", fingerprint="")


@pytest.fixture
def drafter(tmp_path: Path, target: Target) -> Path:
    folder = tmp_path / "drafter"
    folder.mkdir()
    Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer).save(folder)
    write_about(folder, About("medusa", "T", "", target.tokenizer_fingerprint, target.vocab_size, 0))
    return folder


@pytest.fixture
def interrupted(tmp_path: Path, target: Target, drafter: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an evaluation left that was interrupted after two prompts, with a mark in the times of its first one."""
    store, stored = Unfinished.store, []

    def until_the_second(self: Unfinished, *group: Any) -> None:
        store(self, *group)
        stored.append(group)
        if len(stored) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "store", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate({"drafter": drafter}, target, PROMPTS, SETTINGS, unfinished=tmp_path / "unfinished")
    monkeypatch.undo()
    first, _ = sorted((tmp_path / "unfinished").rglob("*.json"))
    content = json.loads(first.read_text())
    content["arms"][0]["generations"][0]["seconds"] = MARKED_SECONDS
    first.write_text(json.dumps(content))
    return tmp_path / "unfinished"


def counts(part: AtTemperature) -> list[Any]:
    figures = part.drafters["drafter"]
    return [
        part.plain.num_tokens,
        part.plain.target_calls,
        figures.prompts,
        figures.block_efficiency,
        figures.mbsu,
        figures.drafter_calls,
        figures.parity,
    ]


def is_continued(part: AtTemperature) -> bool:
    return part.plain.num_tokens / part.plain.tokens_per_second > MARKED_SECONDS


def test_it_continues_and_gives_the_figures_of_a_whole_one(target: Target, drafter: Path, interrupted: Path) -> None:
    (whole,) = evaluate({"drafter": drafter}, target, PROMPTS, SETTINGS).temperatures
    (continued,) = evaluate({"drafter": drafter}, target, PROMPTS, SETTINGS, unfinished=interrupted).temperatures
    assert is_continued(continued)
    assert not is_continued(whole)
    assert counts(continued) == counts(whole)
    assert not interrupted.exists()


@pytest.mark.parametrize("changed", ["settings", "prompts", "domains", "languages", "drafter", "target"])
def test_nothing_is_reused_where_something_differs(
    target: Target, drafter: Path, interrupted: Path, changed: str
) -> None:
    prompts, settings = PROMPTS, SETTINGS
    if changed == "settings":
        settings = replace(SETTINGS, max_new_tokens=9)
    elif changed == "prompts":
        prompts = PROMPTS[:2]
    elif changed == "domains":
        prompts = [replace(prompt, domain="code") for prompt in PROMPTS]
    elif changed == "languages":
        prompts = [replace(prompt, language="python") for prompt in PROMPTS]
    elif changed == "drafter":
        Medusa.create(MedusaSettings(num_heads=1), target=target, tokenizer=target.tokenizer).save(drafter)
    else:
        target.fingerprint = "another"
    (part,) = evaluate({"drafter": drafter}, target, prompts, settings, unfinished=interrupted).temperatures
    assert not is_continued(part)


@pytest.mark.parametrize("nested", [False, True])
def test_an_edited_corpus_is_noticed(target: Target, drafter: Path, tmp_path: Path, nested: bool) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat")
    counted = AdedSettings(corpus=str(corpus))
    settings = replace(SETTINGS, beside=[RasdSettings(retrieval=counted) if nested else counted])

    def made() -> dict[str, Any]:
        return made_with({"drafter": drafter}, target, PROMPTS, settings)

    before = made()
    assert made() == before
    corpus.write_text("the dog")
    assert made() != before
