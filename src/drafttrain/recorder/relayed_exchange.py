"""One request and its answer on their way through the recorder: which bytes are sent on, and which are kept for the record."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from drafttrain.recorder.capture import Capture
from drafttrain.recorder.extra_fields import ExtraFields, StrippedEvents
from drafttrain.recorder.framing import Answer, Request
from drafttrain.recorder.settings import RecorderSettings

RECORDED = ("/chat/completions", "/completions")
REWRITTEN = (b"content-length", b"transfer-encoding", b"trailer", b"expect", b"accept-encoding")
"""Headers of a request that are replaced when its body is replaced."""


@dataclass
class BufferedBytes:
    """Bytes of all unfinished requests and answers that are kept for records."""

    limit: int
    size: int = 0


@dataclass
class RelayedExchange:
    """A request and its answer, fed piece by piece. Every method returns the bytes to send on.

    Args:
        head: The head of the request for the server.
        buffered: Shared by all exchanges.
    """

    request: Request
    head: bytes
    settings: RecorderSettings
    buffered: BufferedBytes
    extra: ExtraFields = field(default_factory=lambda: ExtraFields(b""))
    answer: Answer | None = None
    request_complete: bool = False
    answer_complete: bool = False
    ends_connection: bool = False
    """The answer has no known length, so the end of the connection ends it."""
    drop_reason: str = ""
    """Why a request for text is not recorded; empty: it is."""

    def __post_init__(self) -> None:
        self.began = time.time()
        self.is_recorded = self.request.method == b"POST" and self.request.path.endswith(RECORDED)
        # A list of many small pieces would need many times their size.
        self._request_body, self._answer_body = bytearray(), bytearray()
        self._size = 0
        self._withheld: bytearray | None = None
        """Bytes of a message that may be rewritten; None: the message passes as it comes."""
        self._events: StrippedEvents | None = None
        adds = self.settings.logprobs or self.settings.token_ids
        if self.is_recorded and adds and not _content_coding(self.request.values(b"content-encoding")):
            self._withheld = bytearray()

    @property
    def waits_for_body(self) -> bool:
        """Whether nothing is sent before the request is complete."""
        return self._withheld is not None and not self.request_complete

    # ---------------------------------------------------------------- the request

    def begin_request(self) -> bytes:
        """Forward the head."""
        return self._sent(self.head)

    def add_request_body(self, raw: bytes, content: list[bytes]) -> bytes:
        """Forward a piece of the body.

        Args:
            raw: The bytes as they came, with their framing.
            content: The same without framing.
        """
        self._buffer(self._request_body, content)
        return self._sent(raw)

    def end_request(self) -> bytes:
        """End the request. A body with extra fields is sent here."""
        self.request_complete = True
        if self._withheld is None:
            return b""
        raw, self._withheld = bytes(self._withheld), None
        self.extra = ExtraFields.of(
            bytes(self._request_body),
            chat=self.request.path.endswith(RECORDED[0]),
            logprobs=self.settings.logprobs,
            token_ids=self.settings.token_ids,
        )
        if not self.extra.added:
            return raw
        # The recorder has to read the answer to remove the extra fields from it, so the server must not compress it.
        length = b"Content-Length: %d" % len(self.extra.request)
        head = Request(self.head, self.request.line, self.request.headers)
        return head.rewritten(dropped=REWRITTEN, added=[length, b"Accept-Encoding: identity"]) + self.extra.request

    # ---------------------------------------------------------------- the answer

    def begin_answer(self, answer: Answer) -> bytes:
        """Pass back the head."""
        self.answer = answer
        if answer.status != 200:
            self._discard("")
        coding = _content_coding(answer.values(b"content-encoding"))
        if not (self.extra.added and answer.status == 200 and not coding):
            return answer.raw
        if not self._is_stream:
            self._withheld = bytearray()
            return self._sent(answer.raw)
        self._events = StrippedEvents(self.extra)
        self.ends_connection = self.request.minor == b"0"
        added = b"Connection: close" if self.ends_connection else b"Transfer-Encoding: chunked"
        closing = (b"connection",) if self.ends_connection else ()
        dropped = (b"content-length", b"transfer-encoding", b"trailer", *closing)
        return answer.rewritten(dropped=dropped, added=[added])

    def add_answer_body(self, raw: bytes, content: list[bytes]) -> bytes:
        """Pass back a piece of the body; see `add_request_body`."""
        self._buffer(self._answer_body, content)
        if self._events is not None:
            return self._chunk(b"".join(map(self._events.feed, content)))
        return self._sent(raw)

    def end_answer(self) -> bytes:
        """End the answer. A body without the extra fields is sent here."""
        self.answer_complete = True
        if self._events is not None:
            return self._chunk(self._events.end()) + (b"" if self.ends_connection else b"0\r\n\r\n")
        if self._withheld is None:
            return b""
        assert self.answer is not None
        self._withheld = None
        body = self.extra.stripped(bytes(self._answer_body))
        dropped = (b"content-length", b"transfer-encoding", b"trailer")
        return self.answer.rewritten(dropped=dropped, added=[b"Content-Length: %d" % len(body)]) + body

    def _chunk(self, data: bytes) -> bytes:
        return data if self.ends_connection or not data else b"%x\r\n%b\r\n" % (len(data), data)

    @property
    def _is_stream(self) -> bool:
        assert self.answer is not None
        return self.answer.value(b"content-type").startswith(b"text/event-stream")

    # ---------------------------------------------------------------- the record

    def capture(self) -> Capture:
        """Return both messages for the record."""
        assert self.answer is not None
        return Capture(
            f"rec-{uuid.uuid4().hex}",
            self.request.path,
            bytes(self._request_body),
            bytes(self._answer_body),
            self._is_stream,
            self.began,
            _content_coding(self.request.values(b"content-encoding")),
            _content_coding(self.answer.values(b"content-encoding")),
        )

    def release(self) -> None:
        """Free the buffered bytes."""
        self._discard("")

    def _buffer(self, body: bytearray, content: list[bytes]) -> None:
        if not self.is_recorded or self.drop_reason:
            return
        size = sum(map(len, content))
        if self._size + size > self.settings.record_bytes:
            self._discard("too_large")
        elif self.buffered.size + size > self.buffered.limit:
            self._discard("slow")
        else:
            self._size += size
            self.buffered.size += size
            body += b"".join(content)

    def _discard(self, reason: str) -> None:
        self.buffered.size -= self._size
        self._size = 0
        self._request_body, self._answer_body = bytearray(), bytearray()
        self.drop_reason = reason or self.drop_reason or "ended"

    def _sent(self, raw: bytes) -> bytes:
        """Return the bytes to send now. Withheld ones follow once it is clear that the message is not rewritten."""
        if self._withheld is None:
            return raw
        self._withheld += raw
        if not self.drop_reason:
            return b""
        raw, self._withheld = bytes(self._withheld), None
        return raw


def _content_coding(values: list[bytes]) -> str:
    """Return the content codings of a message; empty: none."""
    coding = b",".join(values).strip().decode("latin-1").lower()
    return "" if coding == "identity" else coding
