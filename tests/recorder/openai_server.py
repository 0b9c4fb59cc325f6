"""A small server with the OpenAI protocol and known answers, and clients, on real loopback sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from drafttrain.data_gen.serving_logs.redaction import redactor
from drafttrain.recorder.capture import line_of
from drafttrain.recorder.own_answers import STATUS_PATH
from drafttrain.recorder.proxy import Recorder
from drafttrain.recorder.record_files import RecordFiles
from drafttrain.recorder.settings import RecorderSettings
from tests.data_gen.serving_logs.log_lines import ids


class Server:
    """Sends `answer` token by token (a token is a character), and keeps the requests.

    Args:
        holds: Before the last token of a stream, wait until `may_finish` is set.
    """

    def __init__(self, answer: str = " answer", *, pause: float = 0.0, holds: bool = False) -> None:
        self.answer = answer
        self.pause = pause
        self.is_waiting, self.may_finish = asyncio.Event(), asyncio.Event()
        if not holds:
            self.may_finish.set()
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_get("/v1/models", self._models)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"data": [{"id": "m"}], "query": request.rel_url.raw_query_string}, headers={"X-Server": "yes"}
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, chat=False)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append((asked, dict(request.headers)))
        if asked.get("prompt") == "fail":
            return web.json_response({"error": "no"}, status=503)
        pieces = list(self.answer)
        if not asked.get("stream"):
            return web.json_response(self._chunk(asked, pieces, chat=chat, whole=True))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for number, piece in enumerate(pieces):
            if self.pause:
                await asyncio.sleep(self.pause)
            if number == len(pieces) - 1:
                self.is_waiting.set()
                await self.may_finish.wait()
            chunk = self._chunk(asked, [piece], chat=chat, last=number == len(pieces) - 1, first=number == 0)
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _chunk(
        self,
        asked: dict[str, Any],
        pieces: list[str],
        *,
        chat: bool,
        whole: bool = False,
        last: bool = True,
        first: bool = True,
    ) -> dict[str, Any]:
        text = "".join(pieces)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if last else None, "logprobs": None}
        choice |= (
            {"text": text} if not chat else {"message" if whole else "delta": {"role": "assistant", "content": text}}
        )
        if asked.get("logprobs"):
            rows = [[(f"token_id:{token}", -0.1), ("token_id:7", -3.0)] for piece in pieces for token in ids(piece)]
            choice["logprobs"] = _chat_logprobs(rows) if chat else _completion_logprobs(rows)
        value: dict[str, Any] = {"id": "r", "model": "m", "choices": [choice]}
        if asked.get("return_token_ids"):
            choice["token_ids"] = [token for piece in pieces for token in ids(piece)]
            if first:
                prompt = asked.get("prompt") or f"<user>{asked['messages'][-1]['content']}<assistant>"
                value["prompt_token_ids"] = ids(prompt) if isinstance(prompt, str) else prompt
        return value


def _chat_logprobs(rows: list[list[tuple[str, float]]]) -> dict[str, Any]:
    entries = [[{"token": token, "logprob": value} for token, value in row] for row in rows]
    return {"content": [row[0] | {"top_logprobs": row} for row in entries]}


def _completion_logprobs(rows: list[list[tuple[str, float]]]) -> dict[str, Any]:
    return {
        "tokens": [row[0][0] for row in rows],
        "token_logprobs": [row[0][1] for row in rows],
        "top_logprobs": [dict(row) for row in rows],
    }


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on loopback and yield its address."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def recorded(upstream: str, out: Path, **settings: Any) -> AsyncIterator[tuple[str, Recorder]]:
    """Start a recorder in front of a server and yield its address. Waiting records are written at the end."""
    chosen = RecorderSettings(upstream=upstream, out=out, port=0, **settings)
    redact = redactor(builtin=True, own=None) if chosen.redact else None
    line = partial(line_of, redact=redact, record_bytes=chosen.record_bytes)
    files = RecordFiles(out, line, rotate_bytes=chosen.rotate_bytes, queue_bytes=chosen.queue_bytes)
    recorder = Recorder(chosen, files)
    files.start()
    try:
        async with recorder.listening() as number:
            yield f"http://127.0.0.1:{number}", recorder
    finally:
        files.close()


async def connected(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection to an address."""
    return await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))


def chat_request(question: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": question}]} | more


async def post(session: aiohttp.ClientSession, address: str, asked: dict[str, Any]) -> bytes:
    """Send a request and return the bytes of the answer."""
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    headers = {"Authorization": "Bearer very-secret-token-1234"}
    async with session.post(address + path, json=asked, headers=headers) as answer:
        return await answer.read()


async def status(session: aiohttp.ClientSession, address: str) -> dict[str, Any]:
    async with session.get(address + STATUS_PATH) as answer:
        value: dict[str, Any] = await answer.json()
        return value
