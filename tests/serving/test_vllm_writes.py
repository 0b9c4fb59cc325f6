"""vLLM as the source of training text, offline and as a server. Needs its environment: make test-serving."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
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
from drafttrain.export.engines import engine_of, environment
from drafttrain.target import Target, TargetSettings
from drafttrain.target.frozen import resolve_folder

pytestmark = pytest.mark.serving

TARGET = "builtin:target"
KEY = "not-a-secret"
START_SECONDS = 240.0
TEXT = "Once upon a time there was a small brown dog. He liked to run and to play with the children of the village. "


@pytest.fixture(scope="module")
def target() -> Target:
    environment.check_installed(engine_of("vllm"))
    return Target.load(TargetSettings(model=TARGET))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("shard-*")) for line in path.read_text().splitlines()]
    return {one["id"]: one for one in map(json.loads, lines)}


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """The base URL of `vllm serve` with the target."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The build for CPUs has no working `vllm` command.
    python = str(environment.folder_of(engine_of("vllm")) / "bin" / "python")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_folder(TARGET))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served", "--dtype", "float32"]
    command += ["--max-model-len", "128", "--max-num-seqs", "8", "--enforce-eager"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": KEY,
    }
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | settings
    log = tmp_path / "server.log"
    with log.open("wb") as written:
        # A session of its own: the engine is a process below the server, and must go with it.
        process = subprocess.Popen(command, stdout=written, stderr=written, env=environ, start_new_session=True)
    try:
        began = time.monotonic()
        while not _answers(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() - began < START_SECONDS, log.read_text()[-4000:]
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


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
            ask_engine=lambda name, worker, request: environment.ask(engine_of(name), request, worker=worker),
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


def test_a_vllm_server_writes_the_same_greedy_records(target, written, server, monkeypatch):
    monkeypatch.setenv("VLLM_TEST_KEY", KEY)
    backend = OpenAISettings(base_url=server, model="served", api_key_variable="VLLM_TEST_KEY", concurrency=6)
    check_same(records(written("builtin")), written("server", backend=backend))
    with pytest.raises(DataError, match="serves no model"):
        written("other", backend=replace(backend, model="other"))
    # Text alone does not say which tokens were written: other ones, as many, spell some of these texts too.
    folder = written("plain", backend=replace(backend, extensions=False))
    ours, plain = records(written("builtin")), records(folder)
    greedy = [id for id, one in plain.items() if one["sampling"]["temperature"] == 0]
    assert len(greedy) >= 6
    for id in greedy:
        assert target.tokenizer.decode(plain[id]["tokens"]) == target.tokenizer.decode(ours[id]["tokens"])
    accounts = json.loads((folder / "manifest.json").read_text())["accounts"]
    assert accounts["ids"] == {"text": len(plain)}
    assert accounts["set_aside"] == {"retokenised": 24 - len(plain)}
