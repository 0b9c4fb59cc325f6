"""What one request and its answer leave behind, as a line that serving logs are read from."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import Refused, mapping
from drafttrain.data_gen.serving_logs.redaction import Redact
from drafttrain.data_gen.serving_logs.rounds import logged_rounds
from drafttrain.data_gen.serving_logs.stream import merged
from drafttrain.data_gen.serving_logs.untrusted import decoded, parsed
from drafttrain.online.recorder_settings import RECORD_BYTES
from drafttrain.online.unpacked import unpacked

MAX_DEPTH = 32
KEPT = (
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "echo", "functions", "logprobs",
    "max_completion_tokens", "max_tokens", "messages", "min_p", "model", "n", "prompt", "seed", "stop", "stream", "suffix",
    "temperature", "tools", "top_k", "top_logprobs", "top_p", "user",
)  # fmt: skip
"""Keys of a request that are written; others may be anything, credentials too. Headers are never even handed here."""
SPELLED = ("token_ids", "prompt_token_ids", "logprobs", "speculative", "speculative_decoding")
"""Keys of an answer that spell its text once more, or say where in it something was."""


@dataclass(frozen=True)
class Capture:
    """The bytes that passed."""

    id: str
    path: str
    request: bytes
    response: bytes
    streamed: bool
    time: float
    """Seconds since 1970, at the request."""
    request_encoding: str = ""
    """Content codings of the request, as its header names them."""
    response_encoding: str = ""

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return len(self.request) + len(self.response)


def line_of(capture: Capture, redact: Redact | None, *, record_bytes: int = RECORD_BYTES) -> bytes:
    """Return the line of a capture, without what must not be kept.

    Args:
        redact: None: everything may be kept.
        record_bytes: Request and answer, unpacked, may have so many bytes together.

    Raises:
        Refused: The bytes are of no known form, or cannot be looked through for what must not be kept.
    """
    asked_bytes = unpacked(capture.request, capture.request_encoding, limit=record_bytes)
    left = record_bytes - len(asked_bytes)
    answered_bytes = unpacked(capture.response, capture.response_encoding, limit=left)
    asked = parsed(decoded(asked_bytes), max_depth=MAX_DEPTH)
    request = {key: asked[key] for key in KEPT if key in asked}
    if capture.streamed:
        response = merged(parsed(event, max_depth=MAX_DEPTH) for event in events(decoded(answered_bytes)))
    else:
        response = parsed(decoded(answered_bytes), max_depth=MAX_DEPTH)
    if isinstance(request.get("user"), str):
        request["user"] = hashlib.sha256(request["user"].encode("utf-8", "replace")).hexdigest()[:16]
    if redact is not None:
        request, response = _redacted(request, response, redact)
    when = datetime.datetime.fromtimestamp(capture.time, datetime.UTC).isoformat(timespec="milliseconds")
    value = {"id": capture.id, "time": when, "path": capture.path, "request": request, "response": response}
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def events(stream: str) -> Iterator[str]:
    """Yield the data of server-sent events, but not the one that says the stream is done."""
    for event in stream.replace("\r\n", "\n").split("\n\n"):
        data = "\n".join(line[5:].strip() for line in event.split("\n") if line.startswith("data:"))
        if data and data != "[DONE]":
            yield data


def _redacted(
    request: dict[str, Any], response: dict[str, Any], redact: Redact
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both without what must not be kept; ids and log-probabilities go where they could spell it.

    Raises:
        Refused: The prompt is token ids alone: what they spell cannot be looked at here.
    """
    prompt = request.get("prompt")
    if isinstance(prompt, list) and any(isinstance(one, int | list) for one in prompt):
        raise Refused("ids_only", "the prompt is token ids alone: what they spell cannot be looked at here")
    texts = _without(response, SPELLED)
    kept_request, kept_texts = _walked(request, redact), _walked(texts, redact)
    choices = response.get("choices") or []
    # What was called is spelled by the ids, and not kept as text.
    called = any(mapping(mapping(one, "choices").get("message") or {}, "message").get("tool_calls") for one in choices)
    changed = (kept_request, kept_texts) != (request, texts) or called
    if changed:
        return kept_request, kept_texts
    return kept_request, response | ({"choices": [_with_counts(one) for one in choices]} if choices else {})


def _with_counts(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice with the numbers of its draft tokens in place of their ids: refused ones spell what is in no text here."""
    rounds = logged_rounds(choice.get("speculative"), "speculative")
    if rounds is None:
        return choice
    counts = {"drafted": [one.num_drafted for one in rounds], "accepted": [one.num_accepted for one in rounds]}
    return choice | {"speculative": counts}


def _walked(value: Any, redact: Redact) -> Any:
    """Return a value with every text in it redacted; its depth was checked before."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key): _walked(part, redact) for key, part in value.items()}
    return [_walked(part, redact) for part in value] if isinstance(value, list) else value


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, keys) for key, part in value.items() if key not in keys}
    return [_without(part, keys) for part in value] if isinstance(value, list) else value
