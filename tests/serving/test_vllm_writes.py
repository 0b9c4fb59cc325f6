"""vLLM as the source of training text: offline, in its own environment. Needs it: make test-serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.data_gen.backends.vllm import VllmSettings
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.export.engines import engine_of
from drafttrain.export.engines.environment import ask, check_installed
from drafttrain.target import Target, TargetSettings

pytestmark = pytest.mark.serving

TEXT = "Once upon a time there was a small brown dog. He liked to run and to play with the children of the village. "


@pytest.fixture(scope="module")
def target() -> Target:
    check_installed(engine_of("vllm"))
    return Target.load(TargetSettings(model="builtin:target"))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("shard-*")) for line in path.read_text().splitlines()]
    return {one["id"]: one for one in map(json.loads, lines)}


def test_greedy_records_are_those_of_the_built_in_backend(target, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)

    def written(name: str, **backend: Any) -> Path:
        settings = GenerateSettings(
            prompts=TextSettings(path=str(tmp_path / "text.txt")),
            prompt_tokens=17,
            num_records=24,
            max_new_tokens=40,
            temperatures=[0.0, 1.0],
            records_per_shard=9,
            **backend,
        )
        return generate(
            settings,
            target,
            tmp_path / name,
            seed=0,
            max_length=128,
            ask_engine=lambda name, worker, request: ask(engine_of(name), request, worker=worker),
        )

    ours = records(written("builtin"))
    folder = written("vllm", backend=VllmSettings())
    theirs = records(folder)
    greedy = [id for id, one in ours.items() if one["sampling"]["temperature"] == 0]
    assert len(greedy) == 12
    assert [theirs[id] for id in greedy] == [ours[id] for id in greedy]
    assert list(theirs) == list(ours)
    sampled = [id for id in ours if id not in greedy]
    assert [theirs[id] for id in sampled] != [ours[id] for id in sampled]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["accounts"]["texts"] == 24
    assert manifest["accounts"]["set_aside"] == {}
