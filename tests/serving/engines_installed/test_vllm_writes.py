"""vLLM as the source of training text, offline and as a server. Needs its environment: make test-serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.backends.openai import OpenAISettings
from drafttrain.data_gen.backends.vllm import VllmSettings
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.distributed.world import without_launcher
from drafttrain.environments.environment import check_installed
from drafttrain.environments.known import VLLM_CPU
from drafttrain.target_model import Target, TargetSettings
from tests.serving.engines_installed.vllm_server import TARGET, vllm_server

pytestmark = pytest.mark.serving

KEY = "not-a-secret"
TEXT = "Once upon a time there was a small brown dog. He liked to run and to play with the children of the village. "


@pytest.fixture(scope="module")
def target() -> Target:
    check_installed(VLLM_CPU)
    return Target.load(TargetSettings(model=TARGET))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("shard-*")) for line in path.read_text().splitlines()]
    return {one["id"]: one for one in map(json.loads, lines)}


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """The base URL of `vllm serve` with the target."""
    with vllm_server(tmp_path / "server.log", ["--served-model-name", "served"], {"VLLM_API_KEY": KEY}) as url:
        yield url


@pytest.fixture
def written(target, tmp_path):
    """A function that has the same texts written by a backend, and returns their folder."""
    (tmp_path / "text.txt").write_text(TEXT * 20)

    def folder(name: str, **backend: Any) -> Path:
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
        )

    return folder


def check_same(ours: dict[str, dict[str, Any]], folder: Path) -> None:
    """Require the same greedy records, other draws, and an account of all."""
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


def test_greedy_records_are_those_of_the_built_in_backend(written):
    check_same(records(written("builtin")), written("vllm", backend=VllmSettings()))


def test_sampled_texts_are_written_where_the_prompts_exceed_what_a_step_reads(target, tmp_path):
    """vLLM on a CPU splits no prompt: it fails where it does, after a text that is sampled with a seed."""
    (tmp_path / "text.txt").write_text(TEXT * 700)
    settings = GenerateSettings(
        prompts=TextSettings(path=str(tmp_path / "text.txt")),
        prompt_tokens=201,
        num_records=60,
        batch_size=60,
        max_new_tokens=4,
        temperatures=[1.0],
        backend=VllmSettings(),
    )
    folder = generate(settings, target, tmp_path / "written", seed=0, max_length=256)
    assert json.loads((folder / "manifest.json").read_text())["accounts"]["texts"] == 60


def test_a_vllm_server_writes_the_same_greedy_records(target, written, server, monkeypatch):
    monkeypatch.setenv("VLLM_TEST_KEY", KEY)
    backend = OpenAISettings(base_url=server, model="served", api_key_variable="VLLM_TEST_KEY", concurrency=6)
    check_same(records(written("builtin")), written("server", backend=backend))
    with pytest.raises(DataError, match="serves no model"):
        written("other", backend=replace(backend, model="other"))
    # Text does not determine its tokens: some of these texts have other spellings with as many tokens.
    folder = written("plain", backend=replace(backend, extensions=False))
    ours, plain = records(written("builtin")), records(folder)
    greedy = [id for id, one in plain.items() if one["sampling"]["temperature"] == 0]
    assert len(greedy) >= 6
    for id in greedy:
        assert target.tokenizer.decode(plain[id]["tokens"]) == target.tokenizer.decode(ours[id]["tokens"])
    accounts = json.loads((folder / "manifest.json").read_text())["accounts"]
    assert accounts["ids"] == {"text": len(plain)}
    assert accounts["set_aside"] == {"retokenised": 24 - len(plain)}


RECIPE = """
name: written
target: {{model: "{target}"}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: forward_kl}}
data:
  max_length: 128
  generate: {{num_records: 12, records_per_shard: 3, max_new_tokens: 16, prompt_tokens: 12, temperatures: [0.0],
             prompts: {{kind: text, path: "{text}"}}, backend: {{kind: {backend}}}}}
  sources: [{{kind: generated}}]
train: {{max_steps: 6, batch_size: 4, warmup_steps: 2}}
"""


def test_each_of_two_processes_has_an_engine_write_its_shards(target, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    found = {}
    for backend in ("builtin", "vllm"):
        recipe, runs = tmp_path / f"{backend}.yaml", tmp_path / backend
        recipe.write_text(RECIPE.format(target=TARGET, text=tmp_path / "text.txt", backend=backend))
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        done = subprocess.run(
            [sys.executable, "-m", *torchrun, "drafttrain", "gen", str(recipe), "--runs", str(runs)],
            env=without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[backend] = records(runs / "written" / "data" / "generated")
    assert len(found["vllm"]) == 12
    assert found["vllm"] == found["builtin"]
