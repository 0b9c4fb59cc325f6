"""Asks the server for extra fields (log-probabilities, token ids) and removes them from the answer that the client receives."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExtraFields:
    """The fields that are added to one request and removed from its answer."""

    request: bytes
    """The body of the request for the server."""
    added: tuple[str, ...] = ()
    """Keys of the answer that the client did not ask for."""

    @staticmethod
    def of(request: bytes, *, chat: bool, logprobs: int, token_ids: bool) -> ExtraFields:
        """Return the request with its extra fields. A body that is not a JSON object passes unchanged."""
        if not logprobs and not token_ids:
            return ExtraFields(request)
        try:
            value = json.loads(request)
        except (ValueError, RecursionError):
            return ExtraFields(request)
        if not isinstance(value, dict):
            return ExtraFields(request)
        added: list[str] = []
        if logprobs and not value.get("logprobs"):
            value |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
            value |= {"return_tokens_as_token_ids": True} if token_ids else {}
            added.append("logprobs")
        if token_ids and not value.get("return_token_ids"):
            value["return_token_ids"] = True
            added += ["token_ids", "prompt_token_ids"]
        return ExtraFields(json.dumps(value).encode(), tuple(added))

    def stripped(self, answer: bytes) -> bytes:
        """Return an answer, or the data of an event, without the extra fields. One that is not a JSON object stays unchanged."""
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return answer
        if not isinstance(value, dict):
            return answer
        for part in [value, *(one for one in _list(value.get("choices")) if isinstance(one, dict))]:
            for key in self.added:
                if key == "logprobs" and key in part:
                    part[key] = None  # Servers write null if log-probabilities were not requested.
                else:
                    part.pop(key, None)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


class StrippedEvents:
    """Removes the extra fields from a stream of server-sent events, line by line."""

    def __init__(self, extra: ExtraFields) -> None:
        self._extra = extra
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """Return the lines that are complete."""
        # A line may end in the middle of a piece. Servers end lines with \n or \r\n.
        *complete, self._rest = (self._rest + piece).split(b"\n")
        return b"".join(self._line(line) + b"\n" for line in complete)

    def end(self) -> bytes:
        """Return the last line, which may have no line end."""
        return self._line(self._rest)

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:") or b"[DONE]" in line[:16]:
            return line
        return b"data: " + self._extra.stripped(line[5:].strip()) + (b"\r" if line.endswith(b"\r") else b"")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
