"""From the bytes of a line to exchanges that may be kept, or to the reason why there are none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from drafttrain.data_gen.serving_logs import dumps, openai, sglang
from drafttrain.data_gen.serving_logs.duplicates import Duplicates, Mark
from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused
from drafttrain.data_gen.serving_logs.pseudonyms import Pseudonyms
from drafttrain.data_gen.serving_logs.redaction import redacted, redactor
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.serving_logs.untrusted import check_text, decoded, guard, parsed
from drafttrain.data_gen.serving_logs.vllm import Requests

DIALECTS = "OpenAI requests and responses, vLLM's and SGLang's request logs, chats, prompt and completion"


class Reading:
    """Reads lines in their order; remembers what it must: the model, requests that wait for an answer, what was said before.

    Args:
        model: The model whose answers were taken before; empty: none was yet.
        pseudonyms: Of the users; None: who asked is left out.
    """

    def __init__(self, settings: ServingLogsSettings, *, model: str = "", pseudonyms: Pseudonyms | None = None) -> None:
        self.settings = settings
        self.model = settings.model or model
        self.redact = redactor(builtin=settings.redact, own=settings.redact_with)
        self.duplicates = Duplicates(similarity=settings.near_duplicates, remembered=settings.remembered)
        self._requests = Requests()
        self._pseudonyms = pseudonyms

    def line(self, data: bytes) -> Iterator[tuple[Exchange, Mark] | Refused]:
        """Yield what a line holds: exchanges, reasons against others; nothing where it only announces an answer.

        Who takes an exchange tells `duplicates` to remember its mark, so that one that gave no record hides no better one.
        """
        try:
            with guard():
                # What brings no id is named by what it holds: a log moves when it is rotated.
                found = self._exchanges(data, id=hashlib.sha256(data).hexdigest()[:16])
        except Refused as reason:
            yield reason
            return
        for exchange in found:
            try:
                with guard():
                    kept = self._kept(exchange)
                    mark = self.duplicates.mark(kept)
            except Refused as reason:
                yield reason
            else:
                yield kept, mark

    def _exchanges(self, data: bytes, *, id: str) -> list[Exchange]:
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

    def _kept(self, exchange: Exchange) -> Exchange:
        """Return the exchange without what must not be kept."""
        for words in (exchange.id, exchange.model, exchange.domain):
            check_text(words)
        if exchange.model and self.model and exchange.model != self.model:
            raise Refused("wrong_model", "another model answered; data.sources.N.model names the one that is read")
        user = self._pseudonyms(exchange.user) if exchange.user and self._pseudonyms else ""
        kept = redacted(replace(exchange, user=user), self.redact)
        self.model = self.model or exchange.model
        return kept
