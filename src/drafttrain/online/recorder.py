"""A reverse proxy before any server with the OpenAI protocol: what passes is unchanged, and what was said is written beside it."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import signal
import time
import uuid
from collections import Counter
from typing import Any

import aiohttp
import uvloop
from aiohttp import web
from yarl import URL

from drafttrain.core.console import say
from drafttrain.core.errors import RecipeError
from drafttrain.data_gen.serving_logs.redaction import redactor
from drafttrain.online.asking import Asking, StrippedEvents
from drafttrain.online.capture import Capture
from drafttrain.online.line_worker import LineWorker
from drafttrain.online.record_files import RecordFiles
from drafttrain.online.recorder_settings import RecorderSettings

STATUS_PATH = "/_recorder"
"""Answered here and not passed on: counts as JSON."""
STATUS_SECONDS = 30.0
RECORDED = ("/chat/completions", "/completions")
HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
"""Headers that speak of one connection (RFC 9110, section 7.6.1)."""
KEEPALIVE_SECONDS = 4.0
"""Servers close what is idle, uvicorn after 5 s; a request on a connection that is just being closed would fail."""


class Recorder:
    """Passes requests on and records those that ask for text.

    Args:
        files: Where captures go; what it cannot take is counted there.
    """

    def __init__(self, settings: RecorderSettings, files: RecordFiles) -> None:
        self.settings = settings
        self.files = files
        self.counts = Counter[str]()
        """Requests by what became of them: recorded ones are offered, others passed, aborted or failed."""
        self._upstream = settings.upstream.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._began = time.monotonic()

    def app(self) -> web.Application:
        """Return the application; the session lives as long as it does."""
        app = web.Application(client_max_size=0)
        app.router.add_get(STATUS_PATH, self._status)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.cleanup_ctx.append(self._with_session)
        return app

    def status(self) -> dict[str, Any]:
        """Return the counts. `written` records are on the disk; whatever happens, they are not lost."""
        return {
            "upstream": self._upstream,
            "seconds": round(time.monotonic() - self._began, 3),
            "requests": self.counts.total(),
            **{name: self.counts[name] for name in ("offered", "passed", "aborted", "failed")},
            "written": self.files.written,
            "queued": self.files.queued,
            "dropped": dict(self.files.dropped),
            "file": self.files.file,
        }

    async def _with_session(self, app: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        yield
        await self._session.close()

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self.status())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one request on and its answer back."""
        is_recorded = request.method == "POST" and request.path.endswith(RECORDED)
        began = time.time()
        body: Any = await request.read() if is_recorded else request.content if request.can_read_body else None
        asking = Asking(b"")
        if is_recorded:
            chat = request.path.endswith(RECORDED[0])
            asking = Asking.of(body, chat=chat, logprobs=self.settings.logprobs, token_ids=self.settings.token_ids)
            body, own = asking.request, body
        dropped = _dropped(request) | {"host"}
        if is_recorded:
            # What is recorded is read here, so it comes unpacked.
            dropped |= {"content-length", "accept-encoding"}
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in dropped]
        headers += [("Accept-Encoding", "identity")] if is_recorded else []
        response = web.StreamResponse()
        assert self._session is not None
        url = URL(self._upstream + request.raw_path, encoded=True)
        try:
            async with self._session.request(
                request.method, url, headers=headers, data=body, allow_redirects=False
            ) as answer:
                passed = await self._pass_back(request, response, answer, asking, keep=is_recorded)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            return self._broken(request, response, error)
        if not is_recorded or answer.status != 200:
            self.counts["failed" if is_recorded else "passed"] += 1
        elif passed is None:
            self.counts["offered"] += 1
            self.files.dropped["too_large"] += 1
        else:
            self.counts["offered"] += 1
            streamed = answer.content_type == "text/event-stream"
            self.files.offer(Capture(f"rec-{uuid.uuid4().hex}", request.path, own, passed, streamed, began))
        return response

    async def _pass_back(
        self,
        request: web.Request,
        response: web.StreamResponse,
        answer: aiohttp.ClientResponse,
        asking: Asking,
        *,
        keep: bool,
    ) -> bytes | None:
        """Send the answer on as it comes and return the bytes that the server sent; None: too many to keep."""
        is_stream = answer.content_type == "text/event-stream"
        response.set_status(answer.status, answer.reason)
        dropped = _dropped(answer) | ({"content-length"} if asking.added else set())
        for name, value in answer.headers.items():
            if name.lower() not in dropped:
                response.headers.add(name, value)
        events = StrippedEvents(asking) if asking.added and is_stream else None
        pieces: list[bytes] = []
        size, limit = 0, self.settings.record_bytes
        if asking.added and not is_stream:
            whole = await answer.read()
            passed = asking.stripped(whole) if answer.status == 200 else whole
            response.content_length = len(passed)
            await response.prepare(request)
            await response.write(passed)
            await response.write_eof()
            return whole if len(whole) <= limit else None
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            passed = piece if events is None else events.feed(piece)
            if passed:
                await response.write(passed)
            if keep and size <= limit:
                size += len(piece)
                pieces.append(piece)
        if events is not None and (rest := events.end()):
            await response.write(rest)
        await response.write_eof()
        return b"".join(pieces) if size <= limit else None

    def _broken(self, request: web.Request, response: web.StreamResponse, error: Exception) -> web.StreamResponse:
        """Answer where the server, or the client, went away."""
        if not response.prepared:
            self.counts["failed"] += 1
            return web.json_response(
                {
                    "error": {
                        "message": f"the server behind the recorder: {type(error).__name__}",
                        "type": "bad_gateway",
                    }
                },
                status=502,
            )
        self.counts["aborted"] += 1
        # An answer that is cut must look cut to the client.
        if request.transport is not None:
            request.transport.abort()
        return response


def _dropped(message: web.Request | aiohttp.ClientResponse) -> set[str]:
    """Return the headers, in small letters, that are not passed on."""
    named = {name.strip().lower() for name in message.headers.get("Connection", "").split(",")}
    return HOP_BY_HOP | named


def record(settings: RecorderSettings) -> dict[str, Any]:
    """Record until SIGTERM or Ctrl-C and return the counts; open requests are let finish, and all that waits is written.

    Raises:
        RecipeError: The address of the server is none.
    """
    problems = []
    url = URL(settings.upstream)
    if url.scheme not in ("http", "https") or not url.host:
        problems.append(f"--upstream: must be an address such as http://127.0.0.1:8000, got {settings.upstream!r}")
    if problems:
        raise RecipeError("arguments", problems)
    redactor(builtin=settings.redact, own=settings.redact_with)  # What cannot be imported is told now.
    worker = LineWorker(redact=settings.redact, redact_with=settings.redact_with)
    files = RecordFiles(settings.out, worker, rotate_bytes=settings.rotate_bytes, queue_bytes=settings.queue_bytes)
    recorder = Recorder(settings, files)
    worker.start()
    files.start()
    try:
        uvloop.run(_serve(recorder))
    finally:
        files.close()
        worker.close()
    say(f"stopped: {_line(recorder.status())}")
    return recorder.status()


async def _serve(recorder: Recorder) -> None:
    settings = recorder.settings
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(recorder.app(), access_log=None, shutdown_timeout=settings.grace_seconds)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port)
        await site.start()
        port = runner.addresses[0][1]
        _without_pauses()
        say(f"recording on http://{settings.host}:{port} what {settings.upstream} answers, into {settings.out}")
        if not _is_loopback(settings.host):
            say(f"{settings.host}: others than this machine can reach the recorder, and the server through it")
        said = ""
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), STATUS_SECONDS)
            except TimeoutError:
                line = _line(recorder.status())
                if line != said:
                    say(line)
                    said = line
    finally:
        await runner.cleanup()


def _without_pauses() -> None:
    """Leave what was imported out of collections: it stays, and looking through it would hold up a token for milliseconds."""
    gc.collect()
    gc.freeze()


def _line(status: dict[str, Any]) -> str:
    dropped = ", ".join(f"{kind} {count:,}" for kind, count in status["dropped"].items()) or "0"
    return (
        f"{status['requests']:,} requests, {status['written']:,} records written, {status['queued']:,} waiting, dropped: {dropped}, "
        f"{status['passed']:,} others passed, {status['aborted']:,} aborted, {status['failed']:,} failed"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
