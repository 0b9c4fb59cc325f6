"""A server generates what the target would have generated here; failures are reported, no answer is lost or requested twice."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from drafttrain.core.console import progress
from drafttrain.core.errors import DataError
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Plan, Task
from drafttrain.data_gen.backends.openai import OpenAI, OpenAISettings
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.settings import GenerateSettings
from drafttrain.data_gen.sources.generated import Generated, GeneratedSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.target_model import Target, TargetSettings
from tests.data_gen.backends.completions_server import (
    CompletionsServer,
    changed,
    late,
    reset,
    serving,
    status,
    truncated,
)

NUM_RECORDS = 10
LATE_SECONDS = 2.5
"""Time limit in tests where some answers never come: hundreds of times what a right one takes."""


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, again and again, " * 4)
    return GenerateSettings(
        prompts=TextSettings(path=str(tmp_path / "text.txt")),
        prompt_tokens=10,
        num_records=NUM_RECORDS,
        max_new_tokens=6,
        temperatures=[0.0],
        batch_size=1,
        records_per_shard=4,
    )


@pytest.fixture
def builtin(settings, tiny_target, tmp_path):
    """The shards of the built-in backend, by file."""
    return shards(generate(settings, tiny_target, tmp_path / "builtin", seed=0, max_length=64))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def records(files: dict[str, bytes]) -> dict[str, Any]:
    return {one["id"]: one for file in files.values() for one in map(json.loads, file.splitlines())}


def entries(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob(name)) for line in path.read_text().splitlines()]


def served(settings: GenerateSettings, server: CompletionsServer, folder: Path, **chosen: Any) -> Path:
    with serving(server) as url:
        chosen = {"backoff_seconds": 0.01, "timeout_seconds": 60.0, "concurrency": 3, "retries": 2} | chosen
        backend = OpenAISettings(**{"base_url": url, "model": "served"} | chosen)
        return generate(replace(settings, backend=backend), server.target, folder, seed=0, max_length=64)


def test_greedy_shards_are_byte_for_byte_those_of_the_built_in_backend(settings, tiny_target, tmp_path, builtin):
    async def with_another(request: Any, answer: dict[str, Any]) -> Any:
        """Wait until another request has arrived."""
        until = time.monotonic() + 30
        while server.most_at_once < 2 and time.monotonic() < until:
            await asyncio.sleep(0.001)
        return web.json_response(answer)

    server = CompletionsServer(tiny_target, lambda number, asked: with_another if number == 0 else None)
    folder = served(settings, server, tmp_path / "g")
    assert shards(folder) == builtin
    assert len(list(Generated(GeneratedSettings(path=str(folder))).items())) == NUM_RECORDS
    assert all(asked["repetition_penalty"] == 1.0 and asked["top_k"] == -1 for asked in server.asked)
    assert 1 < server.most_at_once <= 3
    assert not list(folder.glob("answers-*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    written = sum(sum(one["loss_mask"]) for one in records(builtin).values())
    assert manifest["accounts"]["texts"] == NUM_RECORDS
    assert manifest["accounts"]["tokens"] == written
    assert manifest["accounts"]["set_aside"] == {}
    assert [one["id"] for one in entries(folder, "accounts-*")] == list(records(builtin))
    other = CompletionsServer(Target(tiny_target.model, tiny_target.tokenizer, name="other", fingerprint="other"))
    served(settings, other, folder)
    (kept,) = tmp_path.glob("g-*")
    assert shards(kept) == builtin, "texts of another target"


@pytest.mark.long
def test_text_alone_gives_the_same_records_if_its_tokens_are_certain(tmp_path):
    target = Target.load(TargetSettings(model="builtin:target"))
    (tmp_path / "text.txt").write_text("Once upon a time there was a small brown dog. He liked to run and play. " * 8)
    settings = GenerateSettings(
        prompts=TextSettings(path=str(tmp_path / "text.txt")),
        prompt_tokens=12,
        num_records=6,
        max_new_tokens=8,
        temperatures=[0.0],
        batch_size=1,
    )
    ours = records(shards(generate(settings, target, tmp_path / "b", seed=0, max_length=64)))
    for name, chosen in {
        "ids": {},
        "text": {"prompts_as": "text"},
        "plain": {"extensions": False},
        "spelled": {"extensions": False, "logprobs": True},
    }.items():
        server = CompletionsServer(target, extended=False)
        folder = served(settings, server, tmp_path / name, **chosen)
        theirs, aside = records(shards(folder)), entries(folder, "quarantine-*")
        assert len(theirs) >= 3
        assert all(theirs[id] == ours[id] for id in theirs)
        assert {one["where"] for one in aside} == set(ours) - set(theirs)
        assert {one["reason"].partition(":")[0] for one in aside} <= {"retokenised"}
        assert all(isinstance(asked["prompt"], str) == (name == "text") for asked in server.asked)
        assert any("return_token_ids" in asked for asked in server.asked) == (name in ("ids", "text"))


def test_ambiguous_text_gets_its_tokens_from_the_text_of_each(tmp_path):
    target = Target.load(TargetSettings(model="builtin:target"))
    # As many tokens as `is`, `en`, which the tokenizer would not choose: the text alone is read as `ise`, `n`.
    first, second = (target.tokenizer(word, add_special_tokens=False).input_ids for word in ("is", "en"))
    written = [*first, *second]
    text = target.tokenizer.decode(written)
    again = target.tokenizer(text, add_special_tokens=False).input_ids
    assert len(again) == len(written) == 2
    assert again != written
    (tmp_path / "p.txt").write_text("Once upon a time there was a small brown dog. " * 4)
    settings = GenerateSettings(
        prompts=TextSettings(path=str(tmp_path / "p.txt")),
        prompt_tokens=12,
        num_records=1,
        max_new_tokens=2,
        temperatures=[0.0],
    )

    def answered(**chosen: Any) -> tuple[list[int], dict[str, int]]:
        spelled = {"tokens": ["is", "en"], "token_logprobs": [-1.0, -1.0]} if chosen else None
        fault = changed(text=text, finish_reason="length", logprobs=spelled)
        server = CompletionsServer(target, lambda number, asked: fault, extended=False)
        folder = served(settings, server, tmp_path / f"g{len(chosen)}", **chosen)
        (record,) = records(shards(folder)).values()
        return record["tokens"][12:], json.loads((folder / "manifest.json").read_text())["accounts"]["ids"]

    assert answered() == (again, {"text": 1})
    assert answered(logprobs=True) == (written, {"spelled": 1})


@pytest.mark.parametrize(
    "fault",
    [status(429), status(500), status(503), truncated, reset, late, changed(finish_reason="error")],
    ids=["429", "500", "503", "truncated", "reset", "late", "finish_error"],
)
def test_temporary_failures_are_repeated_and_counted(settings, tiny_target, tmp_path, builtin, fault):
    server = CompletionsServer(tiny_target, lambda number, asked: fault if number in (0, 5) else None)
    folder = served(settings, server, tmp_path / "g", timeout_seconds=LATE_SECONDS if fault is late else 60.0)
    assert shards(folder) == builtin
    assert set(server.answered.values()) == {1}
    assert json.loads((folder / "manifest.json").read_text())["accounts"]["retries"] == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(400), "http_400"),
        (status(500), "http_500"),
        (truncated, "not_json"),
        (late, "timeout"),
        (reset, "no_connection"),
        (changed(finish_reason="error"), "finish_error"),
        (changed(finish_reason="content_filter"), "finish_content_filter"),
        (changed(token_ids=lambda ids: ids[:-2], text=lambda text: "\ufffd"), "short"),
        (changed(token_ids=lambda ids: [*ids, *ids], text=lambda text: "\ufffd"), "long"),
        (changed(token_ids=lambda ids: [0, *ids[1:]], text=lambda text: "\ufffd"), "past_end"),
        (changed(token_ids=lambda ids: [9999, *ids[1:]]), "wrong_tokenizer"),
        (changed(text="something else"), "wrong_tokenizer"),
        (changed(prompt_token_ids=lambda ids: ids[1:]), "wrong_prompt"),
        (changed(token_ids=None, text="\ufffd"), "retokenised"),
        (changed(finish_reason=None), "finish_unknown"),
    ],
)
def test_a_text_that_cannot_be_had_is_quarantined_with_its_reason(
    settings, tiny_target, tmp_path, builtin, fault, reason
):
    chosen = list(records(builtin).values())[5]
    prompt = chosen["tokens"][:10]
    server = CompletionsServer(tiny_target, lambda number, asked: fault if asked["prompt"] == prompt else None)
    folder = served(
        settings, server, tmp_path / "g", timeout_seconds=LATE_SECONDS if fault is late else 60.0, retries=1
    )
    expected = records(builtin)
    del expected[chosen["id"]]
    assert records(shards(folder)) == expected
    (aside,) = entries(folder, "quarantine-*")
    assert aside["reason"].startswith(f"{reason}: ")
    assert aside["item"]["tokens"] == prompt
    assert json.loads((folder / "manifest.json").read_text())["accounts"]["set_aside"] == {reason: 1}


@pytest.mark.parametrize("dies_after", [0, 2, 6])
def test_a_server_that_is_killed_loses_nothing_and_nothing_is_written_twice(
    settings, tiny_target, tmp_path, builtin, dies_after
):
    first = CompletionsServer(tiny_target, dies_after=dies_after)
    with pytest.raises(DataError, match="the same command continues"):
        # Answers sent before the server died arrive while the others wait to retry.
        served(settings, first, tmp_path / "g", retries=1, backoff_seconds=0.5)
    assert not (tmp_path / "g" / "manifest.json").exists()
    kept = len(records(shards(tmp_path / "g"))) + len(entries(tmp_path / "g", "answers-*"))
    # A request whose connection broke may have been answered; no answer was stored, so it is requested again.
    assert kept == first.answered.total() == dies_after
    for path in (tmp_path / "g").glob("answers-*"):
        with path.open("a") as file:
            file.write('{"place":3,"id":"cut o')  # A run was killed while writing this line.
    second = CompletionsServer(tiny_target)
    assert shards(served(settings, second, tmp_path / "g")) == builtin
    assert set((first.answered + second.answered).values()) == {1}
    # The run was killed between a shard and the manifest.
    (tmp_path / "g" / "manifest.json").unlink()
    (tmp_path / "g" / "answers-00001.jsonl").write_text('{"place":0,"id":"an answer","tokens":[1],"account":{}}\n')
    assert shards(served(settings, CompletionsServer(tiny_target), tmp_path / "g")) == builtin
    assert not list((tmp_path / "g").glob("answers-*"))


def test_a_server_that_asks_for_time_gets_it(settings, tiny_target, tmp_path, builtin):
    settings.num_records = settings.records_per_shard = 2
    busy = status(429, retry_after="0.6")
    began = time.monotonic()
    server = CompletionsServer(tiny_target, lambda number, asked: busy if number < 2 else None)
    served(settings, server, tmp_path / "g")
    assert time.monotonic() - began > 0.6
    assert len(server.asked) == 4
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    server = CompletionsServer(tiny_target, lambda number, asked: status(503, retry_after=later))
    with pytest.raises(DataError, match=r"asks to wait for ([678]\d|90) seconds, longer than longest_wait_seconds"):
        served(settings, server, tmp_path / "h", longest_wait_seconds=60.0)


def test_a_failure_of_every_text_stops_the_run(settings, tiny_target, tmp_path):
    with pytest.raises(DataError, match=r"serves no model 'elsewhere'\. Available: served"):
        served(settings, CompletionsServer(tiny_target), tmp_path / "model", model="elsewhere")
    with pytest.raises(DataError, match=r"none of the 4 texts of shard 0 can be used\. The first one: http_422"):
        served(settings, CompletionsServer(tiny_target, lambda number, asked: status(422)), tmp_path / "all")
    with pytest.raises(DataError, match="status 404"):
        served(settings, CompletionsServer(tiny_target, lambda number, asked: status(404)), tmp_path / "address")
    with pytest.raises(DataError, match="the environment variable NO_SUCH_KEY is not set"):
        served(settings, CompletionsServer(tiny_target), tmp_path / "none", api_key_variable="NO_SUCH_KEY")
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_later_unusable_shard_does_not_stop_a_run(tiny_target, tmp_path):
    """One of several processes has no first shard: its outcome must not depend on whether another one has stored it yet."""
    tasks = [Task(f"t{i}", [5 + i, 6, 7], Sampling()) for i in range(2)]
    server = CompletionsServer(tiny_target, lambda number, asked: status(422))
    with serving(server) as url, progress("", total=4, unit="texts") as bar:
        plan = Plan(target=tiny_target, folder=tmp_path, max_new_tokens=4, batch_size=1, seed=0)
        backend = OpenAI(OpenAISettings(base_url=url, model="served", retries=0), plan)
        ((number, outcomes),) = backend.write({1: tasks}, bar)
        assert (number, [outcome.tokens for outcome in outcomes]) == (1, [None, None])
        with pytest.raises(DataError, match="none of the 2 texts of shard 0"):
            list(backend.write({0: tasks}, bar))


def test_the_key_is_sent_and_appears_in_no_message_or_file(settings, tiny_target, tmp_path, builtin, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "sesame-1234")
    with pytest.raises(DataError, match="status 401") as refused:
        served(settings, CompletionsServer(tiny_target, key="x"), tmp_path / "g", api_key_variable="SERVER_KEY")
    assert "sesame" not in str(refused.value)
    server = CompletionsServer(tiny_target, key="sesame-1234")
    folder = served(settings, server, tmp_path / "g", api_key_variable="SERVER_KEY")
    assert shards(folder) == builtin
    assert not any(b"sesame" in path.read_bytes() for path in folder.iterdir())


def test_sampled_texts_are_reported_as_not_reproducible(settings, tiny_target, tmp_path):
    settings.temperatures = [0.0, 1.0]
    server = CompletionsServer(tiny_target)
    folder = served(settings, server, tmp_path / "g")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["reproducible"]["greedy"] is True
    assert manifest["reproducible"]["sampled"] is False
    assert {(asked["temperature"], asked["top_p"], "seed" in asked) for asked in server.asked} == {
        (0.0, 1.0, False),
        (1.0, 0.95, True),
    }
    ours = generate(settings, tiny_target, tmp_path / "b", seed=0, max_length=64)
    assert "reproducible" not in json.loads((ours / "manifest.json").read_text())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://me:secret@host/v1", "http://host/v1?key=secret", "me:secret@host"]
)
def test_an_invalid_address_or_one_with_a_key_is_refused(url):
    (problem,) = OpenAISettings(base_url=url, model="m").check()
    assert "secret" not in problem
    assert not OpenAISettings(base_url="http://host:8000/v1", model="m").check()
