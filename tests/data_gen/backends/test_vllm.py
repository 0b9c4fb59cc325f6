"""Texts by an engine in its own environment: what it wrote before it died is taken up. The engine itself: tests/serving."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.backends.vllm import WORKER, VllmSettings, environment_on
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.serving.engines import checked_installed, environment
from drafttrain.target_model import Target


class Engine:
    """Stands where the engine's process is: takes its request, writes the files that it asks for, by the target's own decoding."""

    def __init__(self, target: Target, *, dies_after: int | None = None) -> None:
        self.target = target
        self.dies_after = dies_after
        self.shards = 0

    def __call__(self, name: str, worker: str, request: Mapping[str, Any]) -> dict[str, Any]:
        assert (name, worker) == ("vllm", WORKER)
        for shard in request["shards"]:
            if self.shards == self.dies_after:
                raise environment.EngineError("killed")
            self.shards += 1
            Path(shard["file"]).write_text(json.dumps([self._text(text, request) for text in shard["texts"]]))
        return {"version": "0"}

    def _text(self, text: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
        task = Task("", text["prompt"], Sampling(text["temperature"], text["top_p"]))
        (tokens,) = continuations([task], self.target, max_new_tokens=request["max_tokens"], seed=text["seed"])
        return {"tokens": tokens, "finish": "stop" if tokens[-1] in self.target.eos_token_ids else "length"}


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, again and again, " * 4)
    return GenerateSettings(
        prompts=TextSettings(path=str(tmp_path / "text.txt")),
        prompt_tokens=10,
        num_records=10,
        max_new_tokens=6,
        temperatures=[0.0],
        batch_size=1,
        records_per_shard=4,
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("dies_after", [0, 2])
def test_an_engine_that_dies_is_asked_for_the_rest_only(settings, tiny_target, tmp_path, dies_after):
    ours = shards(generate(settings, tiny_target, tmp_path / "b", seed=0, max_length=64))
    settings = replace(settings, backend=VllmSettings())
    arguments = {"seed": 0, "max_length": 64}
    with pytest.raises(environment.EngineError):
        generate(
            settings, tiny_target, tmp_path / "g", ask_engine=Engine(tiny_target, dies_after=dies_after), **arguments
        )
    again = Engine(tiny_target)
    folder = generate(settings, tiny_target, tmp_path / "g", ask_engine=again, **arguments)
    assert shards(folder) == ours
    assert again.shards == len(ours) - dies_after
    assert not list(folder.glob("answers-*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"]["backend"] == {"kind": "vllm", "dtype": "float32"}
    assert manifest["accounts"]["texts"] == 10
    assert manifest["reproducible"]["sampled"] is False


def test_a_folder_that_holds_another_model_by_now_is_refused(settings, tiny_target, tmp_path):
    other = Target(tiny_target.model, tiny_target.tokenizer, name=tiny_target.name, fingerprint="another")
    settings = replace(settings, backend=VllmSettings())
    with pytest.raises(DataError, match="is not the target that is loaded"):
        generate(settings, other, tmp_path / "g", seed=0, max_length=64, ask_engine=Engine(tiny_target))


def test_a_target_on_a_gpu_asks_the_build_for_gpus() -> None:
    assert [environment_on(device) for device in ("cpu", "cuda")] == ["vllm", "vllm-cuda"]
    on_cpu, on_cuda = checked_installed(["vllm", "vllm-cuda"])
    assert on_cpu.pins[0].partition("==")[2] == on_cuda.pins[0].partition("==")[2]
    assert on_cuda.pins[0].startswith("vllm==")
