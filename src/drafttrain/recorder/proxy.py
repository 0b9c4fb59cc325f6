"""A reverse proxy before any server with the OpenAI protocol: what passes is unchanged, and what was said is written beside it."""

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
from drafttrain.recorder.passing import Passing
from drafttrain.recorder.record_files import RecordFiles
from drafttrain.recorder.relay import Relays
from drafttrain.recorder.settings import RecorderSettings
from drafttrain.recorder.upstream import Upstream

STATUS_SECONDS = 30.0
WRITING_SHARE = 0.2
"""Of the time to stop: for what still waits to be written when open requests have had theirs."""


class Recorder:
    """Passes requests on and records those that ask for text.

    Args:
        files: Where captures go; what it cannot take is counted there.

    Raises:
        RecipeError: The address of the server is none.
    """

    def __init__(self, settings: RecorderSettings, files: RecordFiles) -> None:
        self.settings = settings
        self.files = files
        self.upstream = Upstream.of(settings.upstream)
        self.relays = Relays(settings, self.upstream, identity=uuid.uuid4().hex, offer=self._offer, status=self.status)
        self.counts = self.relays.counts
        self._began = time.monotonic()
        self._said = set[str]()

    def status(self) -> dict[str, Any]:
        """Return the counts. `written` records are on the disk; whatever happens, they are not lost."""
        names = ("offered", "passed", "aborted", "failed", "refused", "malformed", "timed_out", "loops")
        return {
            "upstream": self.upstream.shown,
            "seconds": round(time.monotonic() - self._began, 3),
            "clients": len(self.relays.open),
            "most_clients": self.relays.most_clients,
            "requests": self.counts.total(),
            **{name: self.counts[name] for name in names},
            "written": self.files.written,
            "queued": self.files.queued,
            "dropped": dict(self.files.dropped),
            "file": self.files.file,
        }

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve, and yield the port; in the end open requests may finish for `grace_seconds`.

        Raises:
            RecipeError: The address cannot be listened on, or is the server's own.
        """
        settings, relays = self.settings, self.relays
        relays.most_clients, relays.most_refused = most_clients(settings.max_clients)
        try:
            sockets = await asyncio.to_thread(listening_sockets, settings.host, settings.port)
        except OSError as error:
            raise RecipeError(
                "arguments",
                [f"--host {settings.host} --port {settings.port}: cannot be listened on: {error.strerror or error}"],
            ) from error
        tasks = [asyncio.create_task(self._watch())]
        try:
            if await asyncio.to_thread(self.upstream.is_one_of, sockets):
                raise RecipeError(
                    "arguments", [f"--upstream: {self.upstream.shown} is the recorder itself, which listens there"]
                )
            tasks += [asyncio.create_task(accept(one, relays, self._say_once)) for one in sockets]
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
            self.relays.watch()

    async def _finish(self) -> None:
        """Let open requests finish, and abort those that take too long."""
        self.relays.stopping = True
        until = time.monotonic() + (1 - WRITING_SHARE) * self.settings.grace_seconds
        for side in [*self.relays.open]:
            if side.is_idle:
                side.close()
        while self.relays.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for side in [*self.relays.open]:
            side.abort()
        while self.relays.open:
            await asyncio.sleep(0)

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            say(words)

    def _offer(self, passing: Passing) -> None:
        if passing.not_kept:
            self.files.dropped[passing.not_kept] += 1
        else:
            self.files.offer(passing.capture())


def record(settings: RecorderSettings) -> dict[str, Any]:
    """Record until SIGTERM or Ctrl-C and return the counts; open requests are let finish, and all that waits is written.

    Raises:
        RecipeError: The address of the server is none, or nothing can listen.
    """
    redactor(builtin=settings.redact, own=settings.redact_with)  # What cannot be imported is told now.
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
    say(f"stopped: {_line(recorder.status())}")
    return recorder.status()


async def _serve(recorder: Recorder) -> float:
    """Serve until a signal comes and return when it did."""
    settings, loop = recorder.settings, asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.set_exception_handler(_say_error)
    async with recorder.listening() as port:
        _without_pauses()
        say(f"recording on http://{settings.host}:{port} what {recorder.upstream.shown} answers, into {settings.out}")
        if not _is_loopback(settings.host):
            say(f"{settings.host}: others than this machine can reach the recorder, and the server through it")
        if (most := recorder.relays.most_clients) < settings.max_clients:
            say(
                f"{most:,} clients at once, not {settings.max_clients:,}: the limit of open files (ulimit -Hn) allows no more"
            )
        said, refused = "", 0
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), STATUS_SECONDS)
                break
            line = _line(recorder.status())
            if line != said:
                say(line)
                said = line
            if recorder.counts["refused"] > refused:
                refused = recorder.counts["refused"]
                say(f"{refused:,} clients were refused with 503: more than {recorder.relays.most_clients:,} at once")
        stopped_at = time.monotonic()
    return stopped_at


def _say_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Print the kind of an error that nothing caught: its text may hold what a client sent."""
    error = context.get("exception")
    say(f"an error inside the recorder: {type(error).__name__ if error else context.get('message')}")


def _without_pauses() -> None:
    """Leave what was imported out of collections: it stays, and looking through it would hold up a token for milliseconds."""
    gc.collect()
    gc.freeze()


def _line(status: dict[str, Any]) -> str:
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
