"""No client can exhaust the recorder or make it log a secret, and every outcome is counted."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from drafttrain.recorder.accepting import most_clients
from tests.recorder.openai_server import Server, chat_request, connected, post, recorded, served, status
from tests.recorder.process import Process
from tests.recorder.wire_cases import ANSWER, JSON, OK, answer_sized, request, sized

PASSWORD, KEY = "pass-word-1234", "sk-abcdefghijklmnopqrstuvwxyz"


@contextlib.asynccontextmanager
async def scripted(answer: bytes) -> AsyncIterator[tuple[str, list[str]]]:
    """Serve one answer to every request, and track which connections are still open."""
    ends: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append("open")
        number = len(ends) - 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            while await reader.read(2**16):
                pass
        ends[number] = "left"
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", ends
    finally:
        server.close()


async def until(wanted: object, found: object) -> None:
    """Wait until a function returns a value."""
    async with asyncio.timeout(30):
        while found() != wanted:  # type: ignore[operator]
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------- clients that disconnect or stall


@pytest.mark.parametrize("how", ["closes", "resets"])
def test_a_client_that_disconnects_before_the_first_byte_ends_its_request_at_the_server(tmp_path, how):
    async def run() -> None:
        async with scripted(b"") as (upstream, ends), recorded(upstream, tmp_path) as (address, recorder):
            clients = [await connected(address) for _ in range(20)]
            for _, writer in clients:
                writer.write(sized(JSON))
            await until(["open"] * 20, lambda: ends)
            for _, writer in clients:
                if how == "resets":
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                writer.close()
            await until(["left"] * 20, lambda: ends)
            await until({"aborted": 20}, lambda: recorder.counts)

    asyncio.run(run())


def test_a_client_that_only_closes_its_sending_side_still_receives_the_answer(tmp_path):
    async def run() -> None:
        async with scripted(OK) as (upstream, _), recorded(upstream, tmp_path) as (address, recorder):
            reader, writer = await connected(address)
            writer.write(request())
            writer.write_eof()
            assert await reader.read() == OK
            writer.close()
            assert recorder.counts == {"passed": 1}

    asyncio.run(run())


@pytest.mark.parametrize(
    "half", [b"POST /v1/comp", b"POST / HTTP/1.1\r\nHost: x\r\n", sized(JSON)[:-3], request() + b"GET /"]
)
def test_an_unfinished_request_times_out_and_is_counted(tmp_path, half):
    async def run() -> None:
        # The server answers once, and waits for the end of a request with a body.
        async with (
            scripted(b"" if half.startswith(b"POST") else OK) as (upstream, ends),
            recorded(upstream, tmp_path, request_seconds=0.1) as (address, recorder),
        ):
            reader, writer = await connected(address)
            writer.write(half)
            answers = await reader.read()
            writer.close()
            if half.startswith(b"GET"):
                assert answers.startswith(OK)
                answers = answers.removeprefix(OK)
            assert answers.startswith(b"HTTP/1.1 408 ")
            assert recorder.counts["timed_out"] == 1
            await until(0, lambda: ends.count("open"))
            # A client that connects and sends nothing is disconnected too.
            reader, writer = await connected(address)
            assert await reader.read() == b""
            writer.close()
            assert recorder.counts["timed_out"] == 1

    asyncio.run(run())


def test_a_slow_answer_does_not_time_out_the_request(tmp_path):
    async def run() -> None:
        server = Server("x" * 5, pause=0.1)
        async with (
            served(server.app()) as upstream,
            recorded(upstream, tmp_path, request_seconds=0.05) as (address, recorder),
            aiohttp.ClientSession() as session,
        ):
            assert (await post(session, address, chat_request("Why?", stream=True))).endswith(b"[DONE]\n\n")
            assert recorder.counts == {"offered": 1}

    asyncio.run(run())


# ---------------------------------------------------------------- many clients


async def crowd(address: str, number: int) -> list[bytes]:
    """Send a request on each of many connections, close none before all are answered, and return the answers."""

    async def ask() -> bytes:
        nonlocal waiting
        reader, writer = await connected(address)
        try:
            # A refused client is answered at once, maybe before it has sent its request.
            with contextlib.suppress(ConnectionError):
                writer.write(sized(JSON))
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"Content-Length: ([0-9]+)", head)
            assert found
            return head + await reader.readexactly(int(found[1]))
        finally:
            waiting -= 1
            if not waiting:
                all_answered.set()
            await all_answered.wait()
            writer.close()

    waiting, all_answered = number, asyncio.Event()
    return await asyncio.gather(*(ask() for _ in range(number)))


def served_or_refused(tmp_path: Path, number: int, *, most: int, open_files: tuple[int, int]) -> None:
    """Connect many clients at once to a recorder that allows `most`. Each is answered and counted."""

    async def run() -> None:
        async with scripted(answer_sized()) as (upstream, _):
            more = ("--max-clients", str(most))
            process = await asyncio.to_thread(Process, upstream, tmp_path, *more, open_files=open_files)
            try:
                answers = await crowd(process.address, number)
                kinds = [one[9:12] for one in answers]
                assert set(kinds) <= {b"200", b"503"}
                assert all(one.endswith(ANSWER) for one in answers if one[9:12] == b"200")
                async with asyncio.timeout(60), aiohttp.ClientSession() as session:
                    while (now := await status(session, process.address))["written"] < kinds.count(b"200"):
                        await asyncio.sleep(0.05)
                assert now["refused"] == kinds.count(b"503") == max(0, number - now["most_clients"])
                assert now["offered"] == now["written"] == kinds.count(b"200")
                assert now["dropped"] == {}
            finally:
                await asyncio.to_thread(process.stop, signal.SIGTERM)

    asyncio.run(run())


def test_clients_beyond_the_limit_are_refused_and_counted(tmp_path):
    async def run() -> None:
        async with (
            scripted(answer_sized()) as (upstream, _),
            recorded(upstream, tmp_path, max_clients=40) as (address, recorder),
        ):
            kinds = [one[9:12] for one in await crowd(address, 60)]
            assert (kinds.count(b"200"), kinds.count(b"503")) == (40, 20)
            assert recorder.counts == {"offered": 40, "refused": 20}
            # Disconnected clients free their places.
            await until(0, lambda: len(recorder.shared.open))
            assert [one[9:12] for one in await crowd(address, 40)] == [b"200"] * 40

    asyncio.run(run())


@pytest.mark.processes
@pytest.mark.parametrize(("most", "open_files"), [(8192, (1024, 8192)), (8192, (1024, 2048)), (1500, (1024, 8192))])
def test_2000_clients_at_once_above_the_soft_limit_are_served_or_refused(tmp_path, most, open_files):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8192:
        pytest.skip("needs 8,192 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8192), hard))
    served_or_refused(tmp_path, 2000, most=most, open_files=open_files)


def test_the_soft_limit_of_open_files_is_raised_as_needed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs 4,096 open files")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert most_clients(500)[0] == 500
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1000
        fit, _ = most_clients(hard)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert hard // 4 < fit < hard // 2
        assert most_clients(1)[0] == 1
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_part_of_a_request_gets_into_the_log(tmp_path):
    async def run() -> str:
        server = Server()
        async with served(server.app()) as upstream, aiohttp.ClientSession() as session:
            named = upstream.replace("//", f"//me:{PASSWORD}@")
            process = await asyncio.to_thread(Process, named, tmp_path, "--request-seconds", "0.2")
            for raw in (
                f"GET / HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nX: \0\r\n\r\n",
                f"GET /{KEY} HTTP/9\r\n\r\n",
                f"POST / HTTP/1.1\r\nAuthorization : Bearer {KEY}\r\n\r\n",
                f"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}\r\n",
                f"POST /?key={KEY} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{KEY}",
                f"api_key={KEY}",
            ):
                reader, writer = await connected(process.address)
                writer.write(raw.encode())
                assert KEY.encode() not in await reader.read()
                writer.close()
            body = {"prompt": "Why?", "api_key": KEY}
            async with session.post(process.address + f"/v1/completions?key={KEY}", json=body) as answer:
                assert answer.status == 200
            _, log = await asyncio.to_thread(process.stop, signal.SIGTERM)
            return process.first_line + log

    log = asyncio.run(run())
    assert KEY not in log
    assert PASSWORD not in log
    assert "4 malformed" in log
    assert "2 timed out" in log
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


# ---------------------------------------------------------------- the end


def test_sigterm_ends_within_the_grace_time_and_counts_aborted_requests(tmp_path):
    async def run() -> None:
        server = Server("endless", holds=True)
        async with served(server.app()) as upstream, aiohttp.ClientSession() as session:
            process = await asyncio.to_thread(Process, upstream, tmp_path, "--grace-seconds", "0.5")
            await post(session, process.address, chat_request("Whole?"))
            async with asyncio.timeout(60):
                while not (await status(session, process.address))["written"]:
                    await asyncio.sleep(0.02)
            asking = asyncio.create_task(post(session, process.address, chat_request("Why?", stream=True)))
            silent = await connected(process.address)
            await server.is_waiting.wait()
            began = time.monotonic()
            code, log = await asyncio.to_thread(process.stop, signal.SIGTERM)
            took = time.monotonic() - began
            with pytest.raises(aiohttp.ClientError):
                await asking
            # Without the limit, the open stream would never end. A busy machine needs some seconds to end a process.
            assert took < 30
            silent[1].close()
            assert code == 0
            assert "1 aborted" in log
            assert "1 records written" in log
            server.may_finish.set()

    asyncio.run(run())
