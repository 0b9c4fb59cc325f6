"""Texts by an engine in its own environment: shards that it wrote before it died are kept. The engine itself: tests/serving."""

from __future__ import annotations

import json
import shutil
import venv
from dataclasses import replace
from pathlib import Path

import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.backends.vllm import VllmSettings, environment_on
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.environments.environment import EngineError, folder_of
from drafttrain.environments.known import VLLM_CPU, VLLM_CUDA
from drafttrain.target_model import Target


@pytest.fixture
def stub(monkeypatch, tmp_path) -> Stub:
    """The environment of vLLM for CPUs: its own Python whose vLLM is stub_vllm.py."""
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    return Stub(tmp_path, monkeypatch)


class Stub:
    """An installed environment, and the requests to its engine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._log = folder / "generate.log"
        home = folder_of(VLLM_CPU)
        venv.create(home, with_pip=False, symlinks=True)
        (packages,) = home.glob("lib/python*/site-packages")
        shutil.copyfile(Path(__file__).with_name("stub_vllm.py"), packages / "vllm.py")
        (home / "installed.json").write_text("{}")
        monkeypatch.setenv("STUB_VLLM_LOG", str(self._log))

    def dies_after(self, num_shards: int | None) -> None:
        """Let the engine's process die at the next shard."""
        if num_shards is None:
            self._monkeypatch.delenv("STUB_VLLM_DIES_AFTER", raising=False)
        else:
            self._monkeypatch.setenv("STUB_VLLM_DIES_AFTER", str(num_shards))

    @property
    def num_shards(self) -> int:
        """Shards that were written so far, by all processes."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


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
def test_after_an_engine_dies_only_the_rest_is_requested(settings, stub, tiny_target, tmp_path, dies_after):
    settings = replace(settings, backend=VllmSettings())
    arguments = {"seed": 0, "max_length": 64}
    whole = shards(generate(settings, tiny_target, tmp_path / "whole", **arguments))
    assert stub.num_shards == len(whole) == 3
    stub.dies_after(dies_after)
    with pytest.raises(EngineError, match="vllm stopped with exit code 3"):
        generate(settings, tiny_target, tmp_path / "texts", **arguments)
    stub.dies_after(None)
    folder = generate(settings, tiny_target, tmp_path / "texts", **arguments)
    assert shards(folder) == whole
    assert stub.num_shards == 2 * len(whole), "no shard was written again"
    assert not list(folder.glob("answers-*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"]["backend"] == {"kind": "vllm", "dtype": "float32"}
    assert manifest["accounts"]["texts"] == 10
    assert manifest["reproducible"]["sampled"] is False


def test_records_hold_the_tokens_of_the_engine(settings, stub, tiny_target, tmp_path):
    folder = generate(replace(settings, backend=VllmSettings()), tiny_target, tmp_path / "g", seed=0, max_length=64)
    lines = (folder / "shard-00000.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        prompt = record["tokens"][:10]
        assert record["tokens"][10:] == [(sum(prompt) + i) % 200 + 5 for i in range(6)]
        assert record["loss_mask"] == [0] * 10 + [1] * 6


def test_a_folder_that_now_holds_another_model_is_refused(settings, tiny_target, tmp_path):
    other = Target(tiny_target.model, tiny_target.tokenizer, name=tiny_target.name, fingerprint="another")
    settings = replace(settings, backend=VllmSettings())
    with pytest.raises(DataError, match="differs from the loaded target"):
        generate(settings, other, tmp_path / "g", seed=0, max_length=64)


def test_a_target_on_a_gpu_uses_the_environment_for_gpus() -> None:
    assert [environment_on(device) for device in ("cpu", "cuda")] == [VLLM_CPU, VLLM_CUDA]
