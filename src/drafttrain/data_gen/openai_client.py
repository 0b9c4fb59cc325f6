"""Client of a server with the OpenAI protocol: completions, models, and pages such as /metrics. No other module here uses HTTP.

A request is repeated while the failure may be temporary. If it keeps failing, a control request of one token shows whether the
server is gone, which stops the run, or only this request fails, which is then quarantined.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from types import TracebackType
from typing import Any, Self

import aiohttp

from drafttrain.core.errors import DataError

AGAIN = {408, 429, *range(500, 600)}
"""Statuses of failures that may be temporary."""
OF_THE_REQUEST = {400, 413, 422}
"""Statuses of a request that this server will never answer; any other status concerns all requests."""
ERROR_FINISHES = ("error", "abort")
"""Finish reasons of an answer that the server aborted."""
LONGEST_BACKOFF_SECONDS = 60.0
CONNECT_SECONDS = 10.0
SHOWN = 200
"""Characters of a server's message that are repeated."""


class ServerGone(DataError):
    """The server does not answer, or refuses all requests."""


class NotAnswered(Exception):
    """One request gets no answer while others do: a kind, a sentence, and the number of retries."""

    def __init__(self, kind: str, sentence: str, retries: int) -> None:
        super().__init__(f"{kind}: {sentence}")
        self.retries = retries


class _Again(Exception):
    """A try failed, maybe temporarily."""

    def __init__(self, kind: str, sentence: str, wait_seconds: float | None = None) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Patience:
    """How often and how long to try."""

    retries: int
    backoff_seconds: float
    """Wait before the first repetition; it doubles each time."""
    longest_wait_seconds: float
    """A server that asks for a longer wait stops the run."""
    timeout_seconds: float


def key_from(variable: str | None, *, named_by: str) -> str | None:
    """Return the key in an environment variable; None if none is named.

    Args:
        named_by: The setting or option that names the variable, for the message.

    Raises:
        DataError: The variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise DataError(f"{named_by}: the environment variable {variable} is not set")
    return key


class Completions:
    """A connection to one server, open for the block.

    Args:
        key: Sent as a bearer token; never part of a message or a file.
    """

    def __init__(self, base_url: str, key: str | None, patience: Patience) -> None:
        self.base_url = base_url.rstrip("/")
        self._key = key
        self._patience = patience
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=self._patience.timeout_seconds, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None, "closed within the block"
        await self._session.close()

    async def check_model(self, model: str) -> None:
        """Refuse a model that is not in the server's list; do nothing if the server lists no models.

        Raises:
            ServerGone: Lists the available models.
        """
        try:
            names = [str(card.get("id")) for card in await self.models()]
        except ServerGone:
            return  # The first text will show what is wrong.
        if names and model not in names:
            raise ServerGone(f"{self.base_url}: serves no model {model!r}. Available: {', '.join(names[:20])}")

    async def models(self) -> list[dict[str, Any]]:
        """Return the entries of the server's list of models.

        Raises:
            ServerGone: It does not answer with a list.
        """
        url = f"{self.base_url}/models"
        try:
            listed = _mapping(await self._body("GET", url, None)).get("data")
        except (_Again, NotAnswered) as reason:
            raise ServerGone(f"{url}: no list of models ({reason})") from reason
        return [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []

    async def page(self, path: str) -> str:
        """Return a page of the server outside the protocol, such as /metrics.

        Raises:
            ServerGone: It does not answer, or has no such page.
        """
        url = self.base_url.removesuffix("/v1") + path
        try:
            return (await self._body("GET", url, None)).decode("utf-8", "replace")
        except (_Again, NotAnswered) as reason:
            raise ServerGone(f"{url}: no answer ({reason})") from reason

    async def post(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object that a page of the server outside the protocol answers, such as vLLM's /tokenize.

        Raises:
            NotAnswered: It refuses this request.
            ServerGone: It does not answer, or has no such page.
        """
        url = self.base_url.removesuffix("/v1") + path
        try:
            return _mapping(await self._body("POST", url, request))
        except _Again as reason:
            raise ServerGone(f"{url}: no answer ({reason})") from reason

    async def complete(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the answer to a request, and how often the request was repeated.

        Raises:
            NotAnswered: This request gets no answer.
            ServerGone: No request does.
        """
        try:
            return await self._with_patience(request, retries=self._patience.retries)
        except _Again as reason:
            await self._check_alive(request, reason)
            raise NotAnswered(reason.kind, str(reason), self._patience.retries) from reason

    async def _check_alive(self, request: Mapping[str, Any], reason: _Again) -> None:
        prompt = request["prompt"]
        control = {"model": request["model"], "prompt": prompt[:1], "max_tokens": 1, "temperature": 0.0}
        try:
            await self._with_patience(control, retries=min(1, self._patience.retries))
        except NotAnswered:
            return  # The server is there and refuses this request.
        except _Again as error:
            raise ServerGone(
                f"{self.base_url}: no answer after {self._patience.retries + 1} tries ({reason.kind}: {reason}), nor to a "
                f"request of one token ({error.kind}: {error}). Received answers are kept: the same command continues"
            ) from error

    async def _with_patience(self, request: Mapping[str, Any], *, retries: int) -> tuple[dict[str, Any], int]:
        for number in range(retries + 1):
            try:
                answer = _mapping(await self._body("POST", f"{self.base_url}/completions", request))
                _check_whole(answer)
                return answer, number
            except _Again as reason:
                wanted = reason.wait_seconds
                if wanted is not None and wanted > self._patience.longest_wait_seconds:
                    raise ServerGone(
                        f"{self.base_url}: asks to wait for {wanted:.0f} seconds, longer than longest_wait_seconds. "
                        "Received answers are kept: the same command continues"
                    ) from reason
                if number == retries:
                    raise
                backoff = min(self._patience.backoff_seconds * 2.0**number, LONGEST_BACKOFF_SECONDS)
                # Randomized: requests that failed together must not return together.
                await asyncio.sleep(max(wanted or 0.0, backoff * random.uniform(0.5, 1.0)))
        raise AssertionError("the last try returns or raises")

    async def _body(self, method: str, url: str, request: Mapping[str, Any] | None) -> bytes:
        assert self._session is not None, "called within the block"
        try:
            # A redirected POST becomes a GET, and the key must not go to another host.
            async with self._session.request(method, url, json=request, allow_redirects=False) as response:
                body = await response.read()
                status, headers = response.status, response.headers
        except TimeoutError as error:
            raise _Again("timeout", f"no answer within {self._patience.timeout_seconds:g} seconds") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Again("no_connection", f"{type(error).__name__}: {self._shown(str(error))}") from error
        if status in AGAIN:
            wait = _retry_after(headers.get("Retry-After"))
            raise _Again(f"http_{status}", self._shown(body.decode("utf-8", "replace")), wait)
        if status in OF_THE_REQUEST:
            raise NotAnswered(f"http_{status}", self._shown(body.decode("utf-8", "replace")), 0)
        if status != 200:
            words = self._shown(body.decode("utf-8", "replace"))
            raise ServerGone(f"{url}: status {status} (wrong address, model or key?): {words}")
        return body

    def _shown(self, words: str) -> str:
        """Return the start of a server's message without the key, which some servers repeat."""
        if self._key:
            words = words.replace(self._key, "(key)")
        return " ".join(words.split())[:SHOWN]


def _mapping(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Again("not_json", f"an answer of {len(body)} bytes that is cut off, or not JSON") from error
    if not isinstance(answer, dict):
        raise _Again("not_json", f"must be a JSON object, got {type(answer).__name__}")
    return answer


def _check_whole(answer: Mapping[str, Any]) -> None:
    """Refuse an answer of status 200 that holds an error."""
    if answer.get("error"):
        raise _Again("failed", "an error instead of an answer")
    choices = answer.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, Mapping) and choice.get("finish_reason") in ERROR_FINISHES:
            raise _Again(f"finish_{choice['finish_reason']}", "the server aborted the text")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a server asks to wait, given as a number or as a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None
