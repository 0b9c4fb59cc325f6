"""Compressed bodies and long requests cost the recorder a bounded amount of memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import tracemalloc
import zlib

import aiohttp
import pytest

from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.recorder.capture import Capture, line_of
from drafttrain.recorder.decompression import CODINGS, decompressed
from tests.recorder.openai_server import Server, chat_request, post, recorded, served
from tests.recorder.wire_cases import ANSWER, JSON


def bomb(coding: str) -> bytes:
    """Return 64 MiB of zeros, compressed."""
    if coding == "br":
        packed: bytes = pytest.importorskip("brotli", minversion="1.2").compress(bytes(2**26), quality=1)
        return packed
    if coding == "zstd":
        packed = pytest.importorskip("zstandard").compress(bytes(2**26))
        return packed
    return gzip.compress(bytes(2**26), 1) if coding == "gzip" else zlib.compress(bytes(2**26), 1)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_a_decompression_bomb_costs_no_more_than_the_limit(coding):
    compressed = bomb(coding)
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for encoding, body in ((coding, compressed), (f"{coding}, gzip", gzip.compress(compressed))):
        tracemalloc.start()
        with pytest.raises(Refused, match="too_large"):
            decompressed(body, encoding, limit=2**20)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
        tracemalloc.stop()
    # tracemalloc does not see memory that the libraries allocate.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - made < 16 * 2**10


def test_compressed_messages_are_recorded_decompressed_within_the_limit():
    packed = gzip.compress(JSON), gzip.compress(gzip.compress(ANSWER))
    capture = Capture("r", "/v1/completions", packed[0], packed[1], False, 0.0, "gzip", "GZIP, x-gzip")
    line = json.loads(line_of(capture, None))
    assert (line["request"], line["response"]) == (json.loads(JSON), json.loads(ANSWER))
    with pytest.raises(Refused, match="too_large"):
        line_of(capture, None, record_bytes=len(JSON) + len(ANSWER) - 1)
    assert line_of(capture, None, record_bytes=len(JSON) + 80)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"x", "gzip"),
        (gzip.compress(b"x" * 99, mtime=0)[:-9], "gzip"),
        (b"", "deflate"),
        (b"x", "own"),
        (b"x", "gzip," * 9),
    ],
    ids=["not gzip", "cut off", "empty", "unknown", "too many"],
)
def test_a_body_that_cannot_be_decompressed_is_refused(body, encoding):
    with pytest.raises(Refused, match="coding"):
        decompressed(body, encoding, limit=100)
    assert set(CODINGS) == {"gzip", "x-gzip", "deflate", "br", "zstd"}


def test_a_request_that_is_too_long_is_relayed_and_not_buffered(tmp_path):
    async def run() -> None:
        server = Server()
        for more in ({}, {"token_ids": True}):
            async with (
                served(server.app()) as upstream,
                recorded(upstream, tmp_path / "a", record_bytes=5000, **more) as (address, recorder),
                recorded(upstream, tmp_path / "b", queue_bytes=5000, **more) as (full_address, full),
                aiohttp.ClientSession() as session,
            ):
                asked = chat_request("Why? " * 2000)
                answer = await post(session, upstream, asked)
                assert await post(session, address, asked) == await post(session, full_address, asked) == answer
                assert recorder.files.dropped == {"too_large": 1}
                assert full.files.dropped == {"slow": 1}
                assert await post(session, address, chat_request("Why?"))
                assert recorder.shared.buffered.size == full.shared.buffered.size == 0
                assert recorder.counts == {"offered": 2}

    asyncio.run(run())
