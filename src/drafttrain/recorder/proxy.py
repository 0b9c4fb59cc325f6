"""A reverse proxy for any server with the OpenAI protocol: it forwards bytes unchanged and records requests and answers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from drafttrain.core.console import say
from drafttrain.core.errors import RecipeError
from drafttrain.data_gen.serving_logs.redaction import redactor
from drafttrain.recorder.accepting import accept, listening_sockets, most_clients
from drafttrain.recorder.line_worker import LineWorker
from drafttrain.recorder.record_files import RecordFiles
from drafttrain.recorder.relayed_exchange import RelayedExchange
from drafttrain.recorder.settings import RecorderSettings
from drafttrain.recorder.shared_state import SharedState
from drafttrain.recorder.upstream import Upstream

STATUS_SECONDS = 30.0
WRITING_SHARE = 0.2
"""Share of the grace time that is reserved for writing records, after open requests had the rest."""


class Recorder:
    """Forwards requests and records those that ask for text.

    Args:
        files: Writes the captures, and counts those that are dropped.

    Raises:
        RecipeError: The upstream address is not valid.
    """

    def __init__(self, settings: RecorderSettings, files: RecordFiles) -> None:
        self.settings = settings
        self.files = files
        self.upstream = Upstream.of(settings.upstream)
        self.shared = SharedState(
            settings, self.upstream, identity=uuid.uuid4().hex, offer=self._offer, status=self.status
        )
        self.counts = self.shared.counts
        self._began = time.monotonic()
        self._printed = set[str]()

    def status(self) -> dict[str, Any]:
        """Return the counts. `written` records are on disk and survive any crash."""
        names = ("offered", "passed", "aborted", "failed", "refused", "malformed", "timed_out", "loops")
        return {
            "upstream": self.upstream.shown,
            "seconds": round(time.monotonic() - self._began, 3),
            "clients": len(self.shared.open),
            "most_clients": self.shared.max_clients,
            "requests": self.counts.total(),
            **{name: self.counts[name] for name in names},
            "written": self.files.written,
            "queued": self.files.queued,
            "dropped": dict(self.files.dropped),
            "file": self.files.file,
        }

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve, and yield the port. At the end, open requests may finish within `grace_seconds`.

        Raises:
            RecipeError: The recorder cannot listen on the address, or the upstream address is its own.
        """
        settings, shared = self.settings, self.shared
        shared.max_clients, shared.max_refused = most_clients(settings.max_clients)
        try:
            sockets = await asyncio.to_thread(listening_sockets, settings.host, settings.port)
        except OSError as error:
            raise RecipeError(
                "arguments",
                [f"--host {settings.host} --port {settings.port}: cannot listen: {error.strerror or error}"],
            ) from error
        tasks = [asyncio.create_task(self._watch())]
        try:
            if await asyncio.to_thread(self.upstream.is_one_of, sockets):
                raise RecipeError(
                    "arguments", [f"--upstream: {self.upstream.shown} is the address of the recorder itself"]
                )
            tasks += [asyncio.create_task(accept(one, shared, self._say_once)) for one in sockets]
            yield sockets[0].getsockname()[1]
        finally:
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks[1:], return_exceptions=True)
            for one in sockets:
                one.close()
            await self._finish()
            tasks[0].cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.settings.request_seconds / 5))
            self.shared.check_times()

    async def _finish(self) -> None:
        """Let open requests finish, and abort those that take too long."""
        self.shared.stopping = True
        until = time.monotonic() + (1 - WRITING_SHARE) * self.settings.grace_seconds
        for connection in [*self.shared.open]:
            if connection.is_idle:
                connection.close()
        while self.shared.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for connection in [*self.shared.open]:
            connection.abort()
        while self.shared.open:
            await asyncio.sleep(0)

    def _say_once(self, message: str) -> None:
        if message not in self._printed:
            self._printed.add(message)
            say(message)

    def _offer(self, exchange: RelayedExchange) -> None:
        if exchange.drop_reason:
            self.files.dropped[exchange.drop_reason] += 1
        else:
            self.files.offer(exchange.capture())


def record(settings: RecorderSettings) -> dict[str, Any]:
    """Record until SIGTERM or Ctrl-C and return the counts. Open requests may finish, and waiting records are written.

    Raises:
        RecipeError: The upstream address is not valid, or the recorder cannot listen.
    """
    redactor(builtin=settings.redact, own=settings.redact_with)  # Fails now if the user's function cannot be imported.
    worker = LineWorker(
        redact=settings.redact,
        redact_with=settings.redact_with,
        record_bytes=settings.record_bytes,
        folder=settings.out,
    )
    files = RecordFiles(settings.out, worker, rotate_bytes=settings.rotate_bytes, queue_bytes=settings.queue_bytes)
    recorder = Recorder(settings, files)
    worker.start()
    files.start()
    stopped_at = None
    try:
        stopped_at = uvloop.run(_serve(recorder))
    finally:
        left = settings.grace_seconds - (time.monotonic() - (stopped_at or time.monotonic()))
        files.close(within_seconds=max(0.0, left), interrupt=worker.interrupt)
        worker.close()
    say(f"stopped: {_summary(recorder.status())}")
    return recorder.status()


async def _serve(recorder: Recorder) -> float:
    """Serve until a signal arrives, and return when it did."""
    settings, loop = recorder.settings, asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.set_exception_handler(_log_error)
    async with recorder.listening() as port:
        _freeze_imports()
        say(f"recording on http://{settings.host}:{port} for {recorder.upstream.shown} into {settings.out}")
        if not _is_loopback(settings.host):
            say(f"{settings.host}: other machines can reach the recorder, and the server through it")
        if (most := recorder.shared.max_clients) < settings.max_clients:
            say(f"at most {most:,} clients, not {settings.max_clients:,}: limited by open files (ulimit -Hn)")
        last_summary, refused = "", 0
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), STATUS_SECONDS)
                break
            summary = _summary(recorder.status())
            if summary != last_summary:
                say(summary)
                last_summary = summary
            if recorder.counts["refused"] > refused:
                refused = recorder.counts["refused"]
                say(f"refused {refused:,} clients with 503: at most {recorder.shared.max_clients:,} at once")
        stopped_at = time.monotonic()
    return stopped_at


def _log_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Print only the type of an uncaught error, because its message may hold data of a client."""
    error = context.get("exception")
    say(f"internal error: {type(error).__name__ if error else context.get('message')}")


def _freeze_imports() -> None:
    """Exclude imported objects from garbage collection: scanning them would delay a token by milliseconds."""
    gc.collect()
    gc.freeze()


def _summary(status: dict[str, Any]) -> str:
    dropped = ", ".join(f"{kind} {count:,}" for kind, count in status["dropped"].items()) or "0"
    return (
        f"{status['requests']:,} requests, {status['written']:,} records written, {status['queued']:,} waiting, dropped: {dropped}, "
        f"{status['passed']:,} others passed, {status['aborted']:,} aborted, {status['failed']:,} failed, {status['refused']:,} refused, "
        f"{status['malformed']:,} malformed, {status['timed_out']:,} timed out, {status['loops']:,} in a loop"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
