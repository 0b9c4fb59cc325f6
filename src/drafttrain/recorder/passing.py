"""One request and its answer as they pass: what is sent on, and what is kept for the record."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from drafttrain.recorder.asking import Asking, StrippedEvents
from drafttrain.recorder.capture import Capture
from drafttrain.recorder.framing import Answer, Request
from drafttrain.recorder.settings import RecorderSettings

RECORDED = ("/chat/completions", "/completions")
REWRITTEN = (b"content-length", b"transfer-encoding", b"trailer", b"expect", b"accept-encoding")
"""Headers of a request that are written again where its body is."""


@dataclass
class Held:
    """Bytes of all requests and answers that are kept until they are whole."""

    limit: int
    size: int = 0


@dataclass
class Passing:
    """A request and its answer, fed piece by piece; every method returns the bytes to send on.

    Args:
        head: The head as it goes to the server.
        held: Shared by all that pass.
    """

    request: Request
    head: bytes
    settings: RecorderSettings
    held: Held
    asking: Asking = field(default_factory=lambda: Asking(b""))
    answer: Answer | None = None
    asked_whole: bool = False
    answered_whole: bool = False
    closes: bool = False
    """The answer's end is the end of the connection, as its length is not known."""
    not_kept: str = ""
    """Why it is not recorded, where it asks for text."""

    def __post_init__(self) -> None:
        self.began = time.time()
        self.recorded = self.request.method == b"POST" and self.request.path.endswith(RECORDED)
        # Arrays, as many small pieces would need many times their size.
        self._asked, self._answered = bytearray(), bytearray()
        self._size = 0
        self._waiting: bytearray | None = None
        """What is held back of a message that is written again; None: it passes as it comes."""
        self._events: StrippedEvents | None = None
        adds = self.settings.logprobs or self.settings.token_ids
        if self.recorded and adds and not _coding(self.request.values(b"content-encoding")):
            self._waiting = bytearray()

    @property
    def waits_for_body(self) -> bool:
        """Whether nothing is sent before the request is whole."""
        return self._waiting is not None and not self.asked_whole

    # ---------------------------------------------------------------- the request

    def asks(self) -> bytes:
        """Begin."""
        return self._sent(self.head)

    def ask(self, raw: bytes, content: list[bytes]) -> bytes:
        """Take a piece of the body."""
        self._keep(self._asked, content)
        return self._sent(raw)

    def asked(self) -> bytes:
        """End the request; a body that asks for more than its client did is written here."""
        self.asked_whole = True
        if self._waiting is None:
            return b""
        raw, self._waiting = bytes(self._waiting), None
        chat = self.request.path.endswith(RECORDED[0])
        self.asking = Asking.of(
            bytes(self._asked), chat=chat, logprobs=self.settings.logprobs, token_ids=self.settings.token_ids
        )
        if not self.asking.added:
            return raw
        # What is taken out of an answer has to be read there, so it comes unpacked.
        length = b"Content-Length: %d" % len(self.asking.request)
        head = Request(self.head, self.request.line, self.request.headers)
        return head.rewritten(dropped=REWRITTEN, added=[length, b"Accept-Encoding: identity"]) + self.asking.request

    # ---------------------------------------------------------------- the answer

    def answers(self, answer: Answer) -> bytes:
        """Begin the answer."""
        self.answer = answer
        if answer.status != 200:
            self._forget("")
        rewritten = self.asking.added and answer.status == 200 and not _coding(answer.values(b"content-encoding"))
        if not rewritten:
            return answer.raw
        if not self._is_stream:
            self._waiting = bytearray()
            return self._sent(answer.raw)
        self._events = StrippedEvents(self.asking)
        self.closes = self.request.minor == b"0"
        added = b"Connection: close" if self.closes else b"Transfer-Encoding: chunked"
        dropped = (b"content-length", b"transfer-encoding", b"trailer", *((b"connection",) if self.closes else ()))
        return answer.rewritten(dropped=dropped, added=[added])

    def pass_back(self, raw: bytes, content: list[bytes]) -> bytes:
        """Take a piece of the answer."""
        self._keep(self._answered, content)
        if self._events is not None:
            return self._chunk(b"".join(map(self._events.feed, content)))
        return self._sent(raw)

    def answered(self) -> bytes:
        """End the answer; one that holds more than its client asked for is written here."""
        self.answered_whole = True
        if self._events is not None:
            return self._chunk(self._events.end()) + (b"" if self.closes else b"0\r\n\r\n")
        if self._waiting is None:
            return b""
        assert self.answer is not None
        self._waiting = None
        body = self.asking.stripped(bytes(self._answered))
        dropped = (b"content-length", b"transfer-encoding", b"trailer")
        return self.answer.rewritten(dropped=dropped, added=[b"Content-Length: %d" % len(body)]) + body

    def _chunk(self, passed: bytes) -> bytes:
        return passed if self.closes or not passed else b"%x\r\n%b\r\n" % (len(passed), passed)

    @property
    def _is_stream(self) -> bool:
        assert self.answer is not None
        return self.answer.value(b"content-type").startswith(b"text/event-stream")

    # ---------------------------------------------------------------- what is kept

    def capture(self) -> Capture:
        """Return what passed, for the record."""
        assert self.answer is not None
        return Capture(
            f"rec-{uuid.uuid4().hex}",
            self.request.path,
            bytes(self._asked),
            bytes(self._answered),
            self._is_stream,
            self.began,
            _coding(self.request.values(b"content-encoding")),
            _coding(self.answer.values(b"content-encoding")),
        )

    def end(self) -> None:
        """Give back the memory."""
        self._forget("")

    def _keep(self, kept: bytearray, content: list[bytes]) -> None:
        if not self.recorded or self.not_kept:
            return
        size = sum(map(len, content))
        if self._size + size > self.settings.record_bytes:
            self._forget("too_large")
        elif self.held.size + size > self.held.limit:
            self._forget("slow")
        else:
            self._size += size
            self.held.size += size
            kept += b"".join(content)

    def _forget(self, why: str) -> None:
        self.held.size -= self._size
        self._size = 0
        self._asked, self._answered = bytearray(), bytearray()
        self.not_kept = why or self.not_kept or "ended"

    def _sent(self, raw: bytes) -> bytes:
        """Return what goes on now: all that was held back, once it is clear that nothing is written again."""
        if self._waiting is None:
            return raw
        self._waiting += raw
        if not self.not_kept:
            return b""
        raw, self._waiting = bytes(self._waiting), None
        return raw


def _coding(values: list[bytes]) -> str:
    """Return the content codings of a message, none as an empty text."""
    coding = b",".join(values).strip().decode("latin-1").lower()
    return "" if coding == "identity" else coding
