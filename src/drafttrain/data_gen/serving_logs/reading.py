"""The one way from a line of a log to records, for a source that reads files once and for an intake that follows them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs import dumps, openai, sglang
from drafttrain.data_gen.serving_logs.duplicates import Duplicates, Mark
from drafttrain.data_gen.serving_logs.encoding import ExchangeEncoder
from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused
from drafttrain.data_gen.serving_logs.lines import Line
from drafttrain.data_gen.serving_logs.pseudonyms import Pseudonyms
from drafttrain.data_gen.serving_logs.redaction import redacted, redactor
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.serving_logs.untrusted import check_text, decoded, guard, parsed
from drafttrain.data_gen.serving_logs.vllm import Requests

DIALECTS = "OpenAI requests and responses, vLLM's and SGLang's request logs, chats, prompt and completion"

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """An exchange that was read, redacted, and compared with earlier ones."""

    exchange: Exchange
    mark: Mark


class LogReader:
    """Reads lines in their order: line -> exchanges (`exchanges`) -> a record (`record`) or a prompt (`prompt`).

    It remembers the model, the requests that wait for an answer, and the exchanges that gave a record.

    Args:
        model: The model whose answers were read before; empty: none yet.
        pseudonyms: Replaces the names of users; None: exchanges carry no user.
    """

    def __init__(self, settings: ServingLogsSettings, *, model: str = "", pseudonyms: Pseudonyms | None = None) -> None:
        self.settings = settings
        self.model = settings.model or model
        self.duplicates = Duplicates(similarity=settings.near_duplicates, remembered=settings.remembered)
        self._redact = redactor(builtin=settings.redact, own=settings.redact_with)
        self._requests = Requests()
        self._pseudonyms = pseudonyms
        self._encoder: ExchangeEncoder | None = None

    def exchanges(self, line: Line) -> Iterator[Found | Refused]:
        """Yield the exchanges of a line, and the reason for each one that cannot be used; nothing for an empty line.

        Use an exchange (`record`, `prompt`) before asking for the next: only those that were used count as earlier ones.
        """
        if line.data is None:
            yield Refused("too_long", "longer than max_line_mb allows")
            return
        if not line.data.strip():
            return
        try:
            with guard():
                # An exchange without an id is named by its content: a log moves when it is rotated.
                found = self._parsed(line.data, id=hashlib.sha256(line.data).hexdigest()[:16])
        except Refused as reason:
            yield reason
            return
        for exchange in found:
            try:
                with guard():
                    kept = self._redacted(exchange)
                    mark = self.duplicates.mark(kept)
            except Refused as reason:
                yield reason
            else:
                yield Found(kept, mark)

    def record(self, found: Found, encoder: Encoder) -> Record:
        """Return the record of an exchange.

        Raises:
            Refused: See `ExchangeEncoder.record`.
        """
        return self._used(found, self._encoded_by(encoder).record)

    def prompt(self, found: Found, encoder: Encoder) -> list[int]:
        """Return the ids of what the target read.

        Raises:
            Refused: See `ExchangeEncoder.prompt`.
        """
        return self._used(found, self._encoded_by(encoder).prompt)

    def _used(self, found: Found, encode: Callable[[Exchange], T]) -> T:
        with guard():
            result = encode(found.exchange)
        # Only now: an exchange that gave no record must not make a better one a duplicate.
        self.duplicates.remember(found.mark)
        return result

    def _encoded_by(self, encoder: Encoder) -> ExchangeEncoder:
        if self._encoder is None:
            self._encoder = ExchangeEncoder(encoder, self._redact, logprobs=self.settings.logprobs)
        return self._encoder

    def _parsed(self, data: bytes, *, id: str) -> list[Exchange]:
        line = decoded(data)
        if not line.startswith("{") and self._requests.is_vllm(line):
            return self._requests.exchanges(line, id=id)
        if not line.startswith(("{", "[")):
            raise Refused("not_a_record", f"none of {DIALECTS}")
        value = parsed(line, max_depth=self.settings.max_depth)
        for dialect, is_of in ((sglang, sglang.is_sglang), (openai, openai.is_openai), (dumps, dumps.is_dump)):
            if is_of(value):
                return dialect.exchanges(value, id=id)
        raise Refused("not_a_record", f"none of {DIALECTS}")

    def _redacted(self, exchange: Exchange) -> Exchange:
        """Return the exchange without private content."""
        for words in (exchange.id, exchange.model, exchange.domain):
            check_text(words)
        if exchange.model and self.model and exchange.model != self.model:
            raise Refused("wrong_model", "another model answered; data.sources.N.model names the one that is read")
        user = self._pseudonyms(exchange.user) if exchange.user and self._pseudonyms else ""
        kept = redacted(replace(exchange, user=user), self._redact)
        self.model = self.model or exchange.model
        return kept
