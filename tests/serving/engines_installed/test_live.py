"""`drafttrain check-server` against vLLM itself: its counters are the evaluator's, number for number. make test-serving."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.checkpoint import read_drafter
from drafttrain.cli import app
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.sources.serving_logs import ServingLogs
from drafttrain.environments.environment import check_installed
from drafttrain.environments.known import VLLM_CPU
from drafttrain.eval.prompts import read_prompts
from drafttrain.serving.reference import count_rounds, decode
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder
from tests.serving.engines_installed.vllm_server import TARGET, vllm_server

pytestmark = pytest.mark.serving

K = 3
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 24, 40


@pytest.fixture
def drafter(tmp_path) -> Path:
    """The embedded drafter with an evaluation of its own."""
    check_installed(VLLM_CPU)
    folder = Path(shutil.copytree(resolve_folder("builtin:drafter"), tmp_path / "drafter"))
    words = [f"eval.num_prompts={PROMPTS}", f"eval.max_new_tokens={NEW_TOKENS}", f"eval.prompt_tokens={PROMPT_TOKENS}"]
    words += ["eval.temperatures=[0]", f"eval.length.num_draft_tokens={K}", "eval.speed_prompts=0"]
    done = CliRunner().invoke(app, ["eval", str(folder), "--target", TARGET, *words])
    assert done.exit_code == 0, done.stderr
    return folder


def evaluated(url: str, drafter: Path, *words: str) -> tuple[int, str, dict]:
    done = CliRunner().invoke(app, ["check-server", str(drafter), url, "--target", TARGET, *words])
    path = drafter / "server.json"
    return done.exit_code, done.stderr, json.loads(path.read_text())["temperatures"][0] if path.exists() else {}


def test_the_counters_of_a_vllm_server_are_those_of_the_evaluator_and_the_promise_is_kept(drafter, tmp_path):
    speculative = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": K}
    target = Target.load(TargetSettings(model=TARGET))
    prompts = read_prompts("builtin:test", target.tokenizer, prompt_tokens=PROMPT_TOKENS, limit=PROMPTS)
    options = ["--speculative-config", json.dumps(speculative), "--per-request-spec-decode-metrics", "detailed"]
    with vllm_server(tmp_path / "log", options) as url:
        code, stderr, row = evaluated(url, drafter, "--require")
        assert code == 0, stderr
        check_logged_rounds(url, drafter, target, prompts, tmp_path / "answers.jsonl")
        shared_code, shared_said, shared = busy(url, drafter)
    result = json.loads((drafter / "eval.json").read_text())
    counted = {one["id"]: one["num_tokens"] for one in result["temperatures"][0]["drafters"]["drafter"]["prompts"]}
    ours = []
    for prompt in prompts:
        length = counted[prompt.id]
        (one,) = decode(
            target,
            read_drafter(drafter, target),
            [prompt],
            Sampling(),
            max_new_tokens=length,
            num_draft_tokens=K,
        )
        ours.append(count_rounds(one, max_new_tokens=length))
    names = ("num_drafts", "num_draft_tokens", "num_accepted")
    assert {name: row["counters"][name] for name in names} == {
        name: sum(getattr(one, name) for one in ours) for name in names
    }
    assert (row["verdict"], row["num_prompts"], row["num_prompts_shared"]) == ("kept", PROMPTS, 0)
    assert "the promise is kept" in stderr
    # Requests of other clients are recognised.
    assert (shared_code == 1 and "also served other clients all the time" in shared_said) or shared[
        "num_prompts_shared"
    ] > 0


def check_logged_rounds(url: str, drafter: Path, target: Target, prompts: Sequence[Prompt], log: Path) -> None:
    """Require that the refused positions in vLLM's answers are those of the evaluator's rounds."""
    with log.open("w") as file:
        for prompt in prompts:
            request = {"model": str(resolve_folder(TARGET)), "prompt": list(prompt.tokens), "max_tokens": NEW_TOKENS}
            request |= {"temperature": 0.0, "return_token_ids": True, "ignore_eos": True}
            file.write(json.dumps({"id": prompt.id, "request": request, "response": asked(url, request)}) + "\n")
    source = ServingLogs(ServingLogsSettings(path=str(log), near_duplicates=None))
    records = [record for item in source.items() for record in source.records(item, Encoder(target.tokenizer, 128))]
    assert [record.id for record in records] == [prompt.id for prompt in prompts]
    assert any(record.refused for record in records)
    proposer = read_drafter(drafter, target)
    for record, prompt in zip(records, prompts, strict=True):
        arguments = {"max_new_tokens": NEW_TOKENS, "num_draft_tokens": K}
        (one,) = decode(target, proposer, [prompt], Sampling(), **arguments)
        # The first token stands before all rounds.
        ends = [(1 + r.start + r.num_accepted, r) for r in one.rounds if 1 + r.start < NEW_TOKENS]
        expected = [place for place, r in ends if r.num_accepted < r.num_draft_tokens and place < NEW_TOKENS]
        assert list(record.refused) == [len(prompt.tokens) + place for place in expected]


def asked(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def busy(url: str, drafter: Path) -> tuple[int, str, dict]:
    """Evaluate while somebody else asks too."""
    over, begun = threading.Event(), threading.Event()

    def others() -> None:
        body = {"model": str(resolve_folder(TARGET)), "prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}
        while not over.is_set():
            asked(url, body)
            begun.set()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        assert begun.wait(60)
        return evaluated(url, drafter)
    finally:
        over.set()
        thread.join()
