"""Asks the server for more than the client did, and gives the client no more than it asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asking:
    """What is added to one request and taken out of its answer."""

    request: bytes
    """The request as the server gets it."""
    added: tuple[str, ...] = ()
    """Keys of the answer that the client did not ask for."""

    @staticmethod
    def of(request: bytes, *, chat: bool, logprobs: int, token_ids: bool) -> Asking:
        """Return what is asked for a request; one that is no JSON object passes as it is."""
        if not logprobs and not token_ids:
            return Asking(request)
        try:
            value = json.loads(request)
        except (ValueError, RecursionError):
            return Asking(request)
        if not isinstance(value, dict):
            return Asking(request)
        added: list[str] = []
        if logprobs and not value.get("logprobs"):
            value |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
            value |= {"return_tokens_as_token_ids": True} if token_ids else {}
            added.append("logprobs")
        if token_ids and not value.get("return_token_ids"):
            value["return_token_ids"] = True
            added += ["token_ids", "prompt_token_ids"]
        return Asking(json.dumps(value).encode(), tuple(added))

    def stripped(self, answer: bytes) -> bytes:
        """Return a whole answer, or the data of an event, without what was added; what is no JSON object stays as it is."""
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return answer
        if not isinstance(value, dict):
            return answer
        for part in [value, *(one for one in _list(value.get("choices")) if isinstance(one, dict))]:
            for key in self.added:
                if key == "logprobs" and key in part:
                    part[key] = None  # As servers write it where nobody asks.
                else:
                    part.pop(key, None)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


class StrippedEvents:
    """Takes a stream of server-sent events in pieces and gives it back line by line without what was added."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """Return the lines that are whole by now."""
        # A line may end in the middle of a piece; servers end theirs with \n or \r\n.
        *whole, self._rest = (self._rest + piece).split(b"\n")
        return b"".join(self._line(line) + b"\n" for line in whole)

    def end(self) -> bytes:
        """Return what is left when the stream ends."""
        return self._line(self._rest)

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:") or b"[DONE]" in line[:16]:
            return line
        return b"data: " + self._asking.stripped(line[5:].strip()) + (b"\r" if line.endswith(b"\r") else b"")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
