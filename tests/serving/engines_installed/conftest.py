"""Fixtures for tests of engines: the embedded target, its prompts, and drafters that have memorized some of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.texts import Prompt
from drafttrain.eval.prompts import read_prompts
from drafttrain.serving.comparison import plain_output
from drafttrain.serving.engines import DecodedPrompt, Job
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from tests.export import folders
from tests.export.trained import learn

TARGET = "builtin:target"
NEW_TOKENS = 40
STEPS = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "causal_lm": {"num_layers": 1, "hidden_size": 64, "num_heads": 2},
    "medusa": {"num_heads": 4, "num_layers": 2},
    "eagle": {"num_steps": 3, "feature_noise": 0.0},
    "eagle3": {"draft_vocab_size": 3072, "num_steps": 3},
    "dflash": {"num_layers": 2, "taps": [1, 3, 5], "block_size": 4, "anchors": 64, "mask_token_id": 1},
    "p_eagle": {"draft_vocab_size": 3072, "num_layers": 2, "num_depths": 3, "mask_token_id": 1},
}


def value_of(text: str) -> bool | int | list[int]:
    """Return the value of a setting that is written after its name."""
    if not text:
        return True
    numbers = [int(word) for word in text.split(",") if word]
    return numbers if "," in text else numbers[0]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load(TargetSettings(model=TARGET))


@pytest.fixture(scope="module")
def prompts(target) -> list[Prompt]:
    return read_prompts("builtin:test", target.tokenizer, prompt_tokens=24, limit=10)


@pytest.fixture(scope="module")
def job(prompts) -> Job:
    return Job(resolve_folder(TARGET), [p.tokens for p in prompts], NEW_TOKENS, [0.0, 1.0], "float32", 128)


@pytest.fixture(scope="module")
def plain(engine, job) -> Sequence[DecodedPrompt]:
    """What the engine of a module writes without a drafter; asked for once."""
    return plain_output(engine, job)


@pytest.fixture(scope="module")
def learned(target, prompts, tmp_path_factory):
    """A function that returns the folder of a drafter that has learned half of the texts by heart.

    Its argument is a kind, then settings: `name` for true, `name=number`, `name=number,number` for a list.
    """
    made: dict[str, Path] = {}

    def folder(words: str) -> Path:
        if words not in made:
            kind, *variants = words.split()
            given = (variant.partition("=") for variant in variants)
            settings = SETTINGS[kind] | {name: value_of(text) for name, _, text in given}
            drafter = folders.drafter_of(kind, target, scale=0.05, **settings)
            learn(drafter, target, prompts[: len(prompts) // 2], steps=STEPS, new_tokens=NEW_TOKENS, lr=3e-3)
            # A path without the words that vLLM takes for a method.
            made[words] = folders.save(drafter, tmp_path_factory.mktemp("learned") / "drafter", target)
        return made[words]

    return folder
