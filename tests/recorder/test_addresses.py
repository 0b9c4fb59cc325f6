"""Which addresses the recorder accepts, and that no address shows a password."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import aiohttp
import pytest

from drafttrain.core.errors import RecipeError
from drafttrain.recorder.proxy import Recorder
from drafttrain.recorder.record_files import RecordFiles
from drafttrain.recorder.settings import RecorderSettings
from drafttrain.recorder.upstream import Upstream
from tests.recorder.openai_server import Server, chat_request, connected, post, recorded, served
from tests.recorder.wire_cases import request

PASSWORD = "pass-word-1234"


def startup_error(tmp_path: Path, upstream: str, port: int) -> str:
    """Return why a recorder does not start."""

    async def run() -> None:
        settings = RecorderSettings(upstream=upstream, out=tmp_path, port=port)
        files = RecordFiles(tmp_path, lambda capture: b"", rotate_bytes=1, queue_bytes=1)
        async with Recorder(settings, files).listening():
            pass

    with pytest.raises(RecipeError) as error:
        asyncio.run(run())
    return str(error.value)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "0.0.0.0"),
        ("127.0.0.1", "[::ffff:127.0.0.1]"),
        ("0.0.0.0", "127.0.0.3"),
        ("0.0.0.0", socket.gethostname()),
    ],
)
def test_an_upstream_that_is_the_recorder_itself_is_an_error(tmp_path, host, name):
    with socket.create_server((host, 0)) as listening:
        port = listening.getsockname()[1]
        assert Upstream.of(f"http://{name}:{port}").is_one_of([listening])
        assert not Upstream.of(f"http://{name}:{port % 60_000 + 1}").is_one_of([listening])
        assert not Upstream.of(f"http://192.0.2.1:{port}").is_one_of([listening])
    if host == "127.0.0.1":
        assert "is the address of the recorder itself" in startup_error(
            tmp_path, f"http://me:{PASSWORD}@{name}:{port}", port
        )
        assert PASSWORD not in startup_error(tmp_path, f"http://me:{PASSWORD}@{name}:{port}", port)


def test_a_port_in_use_is_a_one_line_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen" in startup_error(tmp_path, "http://127.0.0.1:1", port)


def test_recorders_that_forward_to_each_other_detect_the_loop(tmp_path):
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            port = reserved.getsockname()[1]
        async with recorded(f"http://127.0.0.1:{port}", tmp_path) as (address, first):
            second = Recorder(
                type(first.settings)(upstream=address, out=tmp_path, port=port),
                first.files,
            )
            async with second.listening():
                reader, writer = await connected(address)
                writer.write(request())
                assert (await reader.read()).startswith(b"HTTP/1.1 508 ")
                writer.close()
                assert first.counts["loops"] == 1
                assert second.counts["loops"] == 0

    asyncio.run(run())


def test_an_address_may_have_a_path_and_its_password_is_never_shown(tmp_path):
    found = Upstream.of(f"https://me:{PASSWORD}%40@host.example/base/")
    assert found.shown == "https://host.example/base"
    assert found.authorization == b"Basic bWU6cGFzcy13b3JkLTEyMzRA"
    assert Upstream.of("http://[::1]:80").authority == "[::1]"
    for wrong in (
        "ftp://me:{}@h",
        "me:{}@h:80",
        "http://me:{}@h:99999",
        "http://me:a@{}@:80",
        "http://me:{}@h/?x",
        "//me:{}@h",
    ):
        with pytest.raises(RecipeError, match="--upstream: must be an address") as error:
            Upstream.of(wrong.format(PASSWORD))
        assert PASSWORD not in str(error.value)

    async def run() -> None:
        server = Server()
        async with served(server.app()) as upstream, aiohttp.ClientSession() as session:
            named = upstream.replace("//", f"//me:{PASSWORD}@") + "/v1"
            async with recorded(named, tmp_path) as (address, recorder):
                async with session.post(address + "/chat/completions", json=chat_request("Why?")) as answer:
                    assert answer.status == 200
                assert "Authorization" in server.asked[0][1]
                await post(session, address.replace("/v1", ""), chat_request("Why?"))
                async with session.get(address + "/_recorder") as answer:
                    assert PASSWORD not in await answer.text()
                assert recorder.status()["upstream"] == upstream + "/v1"

    asyncio.run(run())
