"""A small server with the OpenAI protocol on loopback that returns a target's own texts, and fails on request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.target_model import Target

Fault = Callable[[web.Request, dict[str, Any]], Any]
"""A faulty answer."""


@dataclass
class CompletionsServer:
    """Serves /v1/models and /v1/completions.

    Args:
        fault: (number of the request, the request) -> a fault, or None.
        extended: It answers with token ids, as vLLM does.
        dies_after: Answers, after which it is gone as a killed process is; None: never.
    """

    target: Target
    fault: Callable[[int, Mapping[str, Any]], Fault | None] = lambda number, asked: None
    extended: bool = True
    dies_after: int | None = None
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Texts that were sent, by prompt, without control requests of one token."""
    most_at_once: int = 0
    _now: int = 0
    _site: Any = None

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "served"}]})

    async def _completions(self, request: web.Request) -> Any:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": f"wrong key {request.headers.get('Authorization')}"}, status=401)
        asked = await request.json()
        self.asked.append(asked)
        number = len(self.asked) - 1
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.sleep(0)
            if self.dies_after is not None and self.answered.total() >= self.dies_after:
                # Like a killed process: the port is closed, and open connections are reset.
                self._site.close()
                request.transport.abort()
                return web.Response()
            if fault := self.fault(number, asked):
                answer = fault(request, self._answer(asked))
                return await answer if asyncio.iscoroutine(answer) else answer
            response = web.json_response(self._answer(asked))
            # Sent before it is counted, so that it arrives even if the next request kills the server.
            await response.prepare(request)
            await response.write_eof()
            if asked["max_tokens"] > 1:
                self.answered[tuple(self._ids(asked["prompt"]))] += 1
            return response
        finally:
            self._now -= 1

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return list(self.target.tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        prompt = self._ids(asked["prompt"])
        task = Task("served", prompt, Sampling(asked["temperature"], asked.get("top_p", 1.0)))
        (tokens,) = continuations([task], self.target, max_new_tokens=asked["max_tokens"], seed=asked.get("seed", 0))
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.target.tokenizer.decode(tokens, skip_special_tokens=True),
            "finish_reason": "stop" if tokens[-1] in self.target.eos_token_ids else "length",
        }
        if self.extended and asked.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
        if asked.get("logprobs"):
            spelled = [self.target.tokenizer.decode([token]) for token in tokens]
            choice["logprobs"] = {"tokens": spelled, "token_logprobs": [-1.0] * len(tokens)}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        return {"id": "cmpl-1", "model": "served", "choices": [choice], "usage": usage}


def status(code: int, *, retry_after: str | None = None) -> Fault:
    """Return a fault of a status."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return lambda request, answer: web.json_response({"error": {"message": "no"}}, status=code, headers=headers)


def truncated(request: web.Request, answer: dict[str, Any]) -> web.Response:
    """A body that is cut off, with the Content-Length of the part."""
    return web.Response(text=json.dumps(answer)[:-20], content_type="application/json")


def reset(request: web.Request, answer: dict[str, Any]) -> web.Response:
    """A connection that is reset."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def late(request: web.Request, answer: dict[str, Any]) -> web.Response:
    """An answer that comes after the client has given up."""
    while request.transport is not None and not request.transport.is_closing():
        await asyncio.sleep(0.01)
    return web.json_response(answer)


def changed(**parts: Any) -> Fault:
    """Return a fault that changes parts of the choice."""

    def fault(request: web.Request, answer: dict[str, Any]) -> web.Response:
        answer["choices"][0] |= {k: v(answer["choices"][0][k]) if callable(v) else v for k, v in parts.items()}
        answer.pop("usage")
        return web.json_response(answer)

    return fault


@contextmanager
def serving(server: CompletionsServer) -> Iterator[str]:
    """Serve in a thread for the block; yield the base URL."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    port = 0

    async def start() -> web.AppRunner:
        nonlocal port
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server._site = site._server
        port = runner.addresses[0][1]
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        with suppress(Exception):
            loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
