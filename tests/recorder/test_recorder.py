"""The recorder relays messages unchanged, its records can be read as training text, and no client waits for it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from drafttrain.recorder.extra_fields import ExtraFields, StrippedEvents
from drafttrain.recorder.settings import RecorderSettings
from tests.data_gen.serving_logs.log_lines import chat_encoder, ids, read
from tests.recorder.openai_server import Server, chat_request, post, recorded, served
from tests.recorder.process import Process, takes_connections

REQUESTS = {
    "chat": chat_request("Why?"),
    "chat, streamed": chat_request("Why now?", stream=True),
    "completion": {"model": "m", "prompt": "Once"},
    "completion, streamed": {"model": "m", "prompt": "Twice", "stream": True},
}


def texts(out: Path, **settings: Any) -> list[str]:
    """Return the recorded texts as the data source reads them."""
    records, kinds = read(out, **settings)
    assert kinds == []
    return [chat_encoder().tokenizer.decode(record.tokens) for record in records]


def ask(out: Path, requests: list[dict[str, Any]], *, server: Server | None = None, **settings: Any) -> tuple[Any, ...]:
    """Send requests directly and through a recorder. Return both lists of answers, and the recorder."""

    async def both() -> tuple[Any, ...]:
        async with (
            served((server or Server()).app()) as upstream,
            recorded(upstream, out, **settings) as (address, recorder),
            aiohttp.ClientSession() as session,
        ):
            direct = [await post(session, upstream, asked) for asked in requests]
            through = [await post(session, address, asked) for asked in requests]
        return direct, through, recorder

    return asyncio.run(both())


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"token_ids": True}, {"logprobs": 2, "token_ids": True}])
def test_answers_are_relayed_unchanged_and_read_as_training_text(tmp_path, extra):
    direct, through, recorder = ask(tmp_path, list(REQUESTS.values()), **extra)
    if extra:
        # Events without their extra fields are serialized again, with the same values.
        direct, through = ([_values(answer) for answer in answers] for answers in (direct, through))
    assert through == direct
    assert recorder.files.written == 4
    end = "" if extra else "<|end|>"  # With logged ids, no end token is added.
    asked = ["<user>Why?", "<user>Why now?"]
    template = "<assistant>" if extra.get("token_ids") else "<|end|><assistant>"
    chats = [f"{one}{template} answer{end}" for one in asked]
    assert sorted(texts(tmp_path, near_duplicates=None)) == sorted([*chats, f"Once answer{end}", f"Twice answer{end}"])
    records, _ = read(tmp_path, near_duplicates=None)
    assert all((record.logged is not None) == ("logprobs" in extra) for record in records)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_an_event_is_relayed_as_soon_as_it_is_complete_with_any_line_end(end):
    extra = ExtraFields.of(b'{"prompt": "x", "stream": true}', chat=False, logprobs=0, token_ids=True)
    original, stripped = b'data: {"choices":[{"text":"a","token_ids":[1]}]}', b'data: {"choices":[{"text":"a"}]}'
    events = StrippedEvents(extra)
    for _ in range(2):
        assert events.feed(original[:20]) == b""
        assert events.feed(original[20:] + end + end) == stripped + end + end
    assert events.feed(b"data: [DONE]" + end + end) + events.end() == b"data: [DONE]" + end + end


def _values(answer: bytes) -> list[Any]:
    if not answer.startswith(b"data:"):
        return [json.loads(answer)]
    return [json.loads(line[5:]) for line in answer.split(b"\n\n") if line and b"[DONE]" not in line]


def test_the_server_receives_only_the_extra_fields_that_were_configured(tmp_path):
    server = Server()
    ask(tmp_path / "a", [REQUESTS["chat"]], server=server)
    (direct, _), (through, _) = server.asked
    assert through == direct
    server.asked.clear()
    ask(tmp_path / "b", [REQUESTS["chat"], REQUESTS["completion"]], server=server, logprobs=3, token_ids=True)
    more = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    assert server.asked[2][0] == REQUESTS["chat"] | more | {"logprobs": True, "top_logprobs": 3}
    assert server.asked[3][0] == REQUESTS["completion"] | more | {"logprobs": 3}


def test_a_client_receives_the_fields_that_it_requested_itself(tmp_path):
    asked = REQUESTS["completion"] | {"logprobs": 1, "return_token_ids": True}
    direct, through, _ = ask(tmp_path, [asked], logprobs=5, token_ids=True)
    assert through == direct
    assert json.loads(through[0])["choices"][0]["token_ids"] == ids(" answer")


def test_other_requests_are_relayed_and_credentials_are_never_recorded(tmp_path):
    async def run() -> None:
        server = Server()
        async with (
            served(server.app()) as upstream,
            recorded(upstream, tmp_path) as (address, recorder),
            aiohttp.ClientSession() as session,
        ):
            async with session.get(address + "/v1/models?a=%20b") as answer:
                assert (await answer.json())["query"] == "a=%20b"
                assert answer.headers["X-Server"] == "yes"
            async with session.get(address + "/nowhere") as answer:
                assert answer.status == 404
            await post(session, address, REQUESTS["chat"] | {"api_key": "hunter2hunter2", "user": "someone"})
            assert server.asked[0][1]["Authorization"] == "Bearer very-secret-token-1234"
            await post(session, address, {"prompt": "fail"})
            assert recorder.counts == {"passed": 2, "offered": 1, "failed": 1}

    asyncio.run(run())
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "Why?" in written
    for secret in ("very-secret-token-1234", "hunter2", "someone", "Authorization"):
        assert secret not in written


def test_private_data_is_not_recorded_and_neither_are_ids_that_spell_it(tmp_path):
    asked = [chat_request("I am bob@mail.example"), {"model": "m", "prompt": ids("bob@mail.example")}]
    _, through, recorder = ask(tmp_path, asked, logprobs=2, token_ids=True)
    assert all(json.loads(answer)["choices"] for answer in through)
    assert recorder.files.dropped == {"ids_only": 1}
    (line,) = [json.loads(line) for path in tmp_path.iterdir() for line in path.open()]
    assert line["request"]["messages"][0]["content"] == "I am [e-mail]"
    assert not {"prompt_token_ids", "token_ids", "logprobs"} & {*line["response"], *line["response"]["choices"][0]}
    assert texts(tmp_path) == ["<user>I am [e-mail]<|end|><assistant> answer<|end|>"]


def test_files_are_rotated_by_size_and_a_full_queue_drops_records(tmp_path):
    asked = [chat_request(f"Question {number}") for number in range(6)]
    _, _, recorder = ask(tmp_path / "a", asked, rotate_bytes=400)
    assert recorder.files.written == 6
    assert len(list((tmp_path / "a").iterdir())) >= 3
    assert len(texts(tmp_path / "a")) == 6
    direct, through, recorder = ask(tmp_path / "b", asked, queue_bytes=10)
    assert through == direct
    assert recorder.files.dropped == {"slow": 6}
    _, through, recorder = ask(tmp_path / "c", asked, record_bytes=10)
    assert through == direct
    assert recorder.files.dropped == {"too_large": 6}


def test_an_unreachable_server_is_an_error_and_a_client_that_disconnects_is_counted(tmp_path):
    async def run() -> None:
        async with (
            recorded(f"http://127.0.0.1:{not_listening.getsockname()[1]}", tmp_path) as (address, recorder),
            aiohttp.ClientSession() as session,
        ):
            answer = json.loads(await post(session, address, REQUESTS["chat"]))
            assert answer["error"]["type"] == "bad_gateway"
            assert recorder.counts == {"failed": 1}
        async with (
            served(Server("x" * 200, pause=0.002).app()) as upstream,
            recorded(upstream, tmp_path) as (address, recorder),
        ):
            async with aiohttp.ClientSession() as session:
                asked = REQUESTS["chat, streamed"]
                async with session.post(address + "/v1/chat/completions", json=asked) as response:
                    await response.content.readany()
                    response.close()
            async with asyncio.timeout(60):
                while not recorder.counts["aborted"]:
                    await asyncio.sleep(0.01)
            assert recorder.counts == {"aborted": 1}
            assert recorder.files.written == 0

    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        asyncio.run(run())


# ---------------------------------------------------------------- the command


def test_sigterm_lets_open_requests_finish_and_writes_waiting_records(tmp_path):
    async def run() -> None:
        server = Server("slow answer", holds=True)
        async with served(server.app()) as upstream, aiohttp.ClientSession() as session:
            process = await asyncio.to_thread(Process, upstream, tmp_path)
            asking = asyncio.create_task(post(session, process.address, REQUESTS["chat, streamed"]))
            await server.is_waiting.wait()
            stopping = asyncio.create_task(asyncio.to_thread(process.stop, signal.SIGTERM))
            # It has received the signal once it accepts no new connections.
            while await takes_connections(process.address):
                await asyncio.sleep(0.01)
            server.may_finish.set()
            code, log = await stopping
            assert (await asking).endswith(b"[DONE]\n\n")
            assert code == 0
            assert "1 records written" in log

    asyncio.run(run())
    assert texts(tmp_path) == ["<user>Why now?<|end|><assistant>slow answer<|end|>"]


def test_with_a_full_disk_requests_succeed_and_drops_are_counted(tmp_path):
    async def run() -> None:
        async with served(Server("y" * 100).app()) as upstream, aiohttp.ClientSession() as session:
            process = await asyncio.to_thread(Process, upstream, tmp_path, limit_bytes=200)
            direct = await post(session, upstream, REQUESTS["chat"])
            for _ in range(3):
                assert await post(session, process.address, REQUESTS["chat"]) == direct
            code, log = await asyncio.to_thread(process.stop, signal.SIGTERM)
            assert code == 0
            assert "0 records written" in log
            assert "dropped: disk 3" in log

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_the_default_host_is_loopback_and_an_invalid_upstream_is_an_error():
    assert RecorderSettings(upstream="http://x", out=Path(), port=0).host == "127.0.0.1"
    command = [
        sys.executable,
        "-m",
        "drafttrain",
        "record",
        "--upstream",
        "localhost:8000",
        "--port",
        "0",
        "--out",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--upstream: must be an address such as http://127.0.0.1:8000" in done.stderr
