"""Client and server see the same bytes and the same disconnects with the recorder as without it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from drafttrain.recorder.own_answers import LOOP_HEADER
from drafttrain.recorder.proxy import Recorder
from tests.recorder.openai_server import recorded, served
from tests.recorder.wire_cases import HOST, NUM_CASES, PASSED, REFUSED, Case, Exchange

RESET = struct.pack("ii", 1, 0)
OWN = re.compile(rb"\r\n" + LOOP_HEADER + rb": [0-9a-f]{32}(?=\r\n)")
SECONDS = 20.0


class ScriptedServer:
    """Sends the answers of the case without parsing requests, and keeps the bytes it received."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.got: Future[bytes] = Future()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got, future, case = b"", self.got, self.case
        assert case is not None
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            for one in case.exchanges:
                got += await _asked(reader, one)
                writer.write(one.answer)
                await writer.drain()
                if one.end == "reset":
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    writer.transport.abort()
                elif one.end == "close":
                    writer.write_eof()
            while piece := await reader.read(2**16):
                got += piece
        future.set_result(got)
        writer.close()


async def _asked(reader: asyncio.StreamReader, one: Exchange) -> bytes:
    sent = b"".join(one.request)
    head = await reader.readuntil(b"\r\n\r\n")
    rest = len(sent) - sent.index(b"\r\n\r\n") - 4 if one.after is None else one.after
    return head + await reader.readexactly(rest)


@dataclass
class StrictServer:
    """A real server that refuses ambiguous requests, and keeps the requested paths."""

    paths: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        await request.read()
        return web.Response(text="ok")

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        return app


@dataclass
class Wire:
    """Servers, each with a recorder in front."""

    scripted: ScriptedServer
    strict: StrictServer
    ports: dict[str, int]
    recorder: Recorder


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    ready: Future[tuple[Wire, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve_all(folder: Path) -> None:
        scripted, strict, stop = ScriptedServer(), StrictServer(), asyncio.Event()
        server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0, limit=2**20)
        port = server.sockets[0].getsockname()[1]
        async with (
            served(strict.app()) as address,
            recorded(f"http://127.0.0.1:{port}", folder / "a", grace_seconds=2.0) as (before_scripted, recorder),
            recorded(address, folder / "b", grace_seconds=2.0) as (before_strict, _),
        ):
            ports = {"scripted": f":{port}", "recorder": before_scripted, "strict": address, "guard": before_strict}
            numbers = {name: int(one.rpartition(":")[2]) for name, one in ports.items()}
            ready.set_result((Wire(scripted, strict, numbers, recorder), asyncio.get_running_loop(), stop))
            await stop.wait()
        server.close()

    def run() -> None:
        try:
            uvloop.run(serve_all(tmp_path_factory.mktemp("wire")))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    standing, loop, stop = ready.result(SECONDS)
    yield standing
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def asked(port: int, case: Case) -> tuple[bytes, str]:
    """Send the requests of a case. Return the answers and how the connection ended. The length of each answer is known."""
    got, wanted = b"", 0
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = ""
        try:
            for number, one in enumerate(case.exchanges):
                for piece in one.request:
                    client.sendall(piece)
                wanted += len(one.answer)
                if case.at_once and number < len(case.exchanges) - 1:
                    continue
                while not end and (len(got) < wanted or one.end):
                    piece = client.recv(2**16)
                    got += piece
                    end = "" if piece else "closed"
            if not end:
                client.shutdown(socket.SHUT_WR)
                while piece := client.recv(2**16):
                    got += piece
                end = "closed when it left"
        except ConnectionResetError:
            end = "reset"
    return got, end


@pytest.mark.parametrize("case", PASSED, ids=lambda case: case.name)
def test_bytes_and_disconnects_equal_those_without_the_recorder(wire: Wire, case: Case) -> None:
    results = []
    for name in ("scripted", "recorder"):
        wire.scripted.case, wire.scripted.got = case, Future()
        answered = asked(wire.ports[name], case)
        results.append((answered, wire.scripted.got.result(SECONDS)))
    (direct, direct_got), (through, through_got) = results
    last = case.exchanges[-1]
    if last.end == "reset":
        # A reset may overtake bytes that were sent before it.
        assert through[1] == direct[1] == "reset"
        assert last.answer.startswith(through[0])
    else:
        assert through == direct
        assert direct[0] == b"".join(one.answer for one in case.exchanges)
    # The server sees its own host name and the mark of the recorder, and no other change.
    own_name = b"Host: 127.0.0.1:%d\r\n" % wire.ports["scripted"]
    through_got, marks = OWN.subn(b"", through_got.replace(own_name, HOST))
    assert marks == len(case.exchanges)
    if last.after == 0 and last.end == "close":
        # The server disconnected without reading the rest.
        assert direct_got.startswith(through_got)
    else:
        assert through_got == direct_got.removeprefix(b"\r\n")


@pytest.mark.parametrize("name", REFUSED)
def test_an_ambiguous_request_is_refused(wire: Wire, name: str) -> None:
    def status(port: int) -> tuple[list[bytes], list[str]]:
        wire.strict.paths.clear()
        got = b""
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
            client.sendall(REFUSED[name])
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while piece := client.recv(2**16):
                    got += piece
        return re.findall(rb"HTTP/1\.[01] ([0-9]+)", got), [*wire.strict.paths]

    direct, through = status(wire.ports["strict"]), status(wire.ports["guard"])
    assert through[0] == [b"400"]
    assert "/smuggled" not in through[1]
    assert (direct[0] or [b"400"])[0] in (b"400", b"501")


def test_there_are_enough_cases():
    assert NUM_CASES >= 67 + 44


def test_no_client_is_left_connected(wire: Wire) -> None:
    status: dict[str, Any] = wire.recorder.status()
    assert status["clients"] == 0
