"""Turns one request and its answer into a line of the serving log."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import Refused, mapping
from drafttrain.data_gen.serving_logs.private.values import spells_private, without_private
from drafttrain.data_gen.serving_logs.pseudonyms import Pseudonyms
from drafttrain.data_gen.serving_logs.redaction import Redact
from drafttrain.data_gen.serving_logs.rounds import logged_rounds
from drafttrain.data_gen.serving_logs.stream import merged
from drafttrain.data_gen.serving_logs.untrusted import decoded, parsed
from drafttrain.recorder.decompression import decompressed
from drafttrain.recorder.settings import RECORD_BYTES

MAX_DEPTH = 32
KEPT = (
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "echo", "functions", "logprobs",
    "max_completion_tokens", "max_tokens", "messages", "min_p", "model", "n", "prompt", "seed", "stop", "stream", "suffix",
    "temperature", "tools", "top_k", "top_logprobs", "top_p", "user",
)  # fmt: skip
"""Keys of a request that are written. Other keys may hold anything, even credentials. Headers never get here."""
KEPT_OF_ANSWER = (
    "choices", "created", "error", "id", "metrics", "model", "object", "prompt_token_ids", "service_tier", "system_fingerprint", "usage",
)  # fmt: skip
KEPT_OF_CHOICE = (
    "finish_reason", "index", "logprobs", "matched_stop", "message", "prompt_token_ids", "speculative", "stop_reason", "text", "token_ids",
)  # fmt: skip
KEPT_OF_TURN = (
    "content", "function_call", "name", "reasoning", "reasoning_content", "refusal", "role", "tool_call_id", "tool_calls",
)  # fmt: skip
"""With redaction, only these keys of an answer, its choices and the turns of a chat are written."""
ENDPOINT = re.compile(r"(?:/v\d)?(?:/chat)?/completions\Z")
SPELLED = ("token_ids", "prompt_token_ids", "logprobs", "speculative", "speculative_decoding")
"""Keys of an answer that repeat its text, or refer to positions in it."""


@dataclass(frozen=True)
class Capture:
    """The bytes of one request and its answer."""

    id: str
    path: str
    request: bytes
    response: bytes
    streamed: bool
    time: float
    """When the request began, in seconds since 1970."""
    request_encoding: str = ""
    """Value of the request's Content-Encoding header."""
    response_encoding: str = ""

    @property
    def size(self) -> int:
        """Bytes of both bodies."""
        return len(self.request) + len(self.response)


def line_of(
    capture: Capture, redact: Redact | None, *, record_bytes: int = RECORD_BYTES, pseudonyms: Pseudonyms | None = None
) -> bytes:
    """Return the log line of a capture, redacted.

    Args:
        redact: None: nothing is redacted.
        record_bytes: Maximum bytes of request and answer together, decompressed.
        pseudonyms: Pseudonyms of users; None: users are not logged.

    Raises:
        Refused: The format is unknown, or private data cannot be ruled out.
    """
    request_bytes = decompressed(capture.request, capture.request_encoding, limit=record_bytes)
    left = record_bytes - len(request_bytes)
    response_bytes = decompressed(capture.response, capture.response_encoding, limit=left)
    asked = parsed(decoded(request_bytes), max_depth=MAX_DEPTH)
    request = {key: asked[key] for key in KEPT if key in asked}
    if capture.streamed:
        response = merged(parsed(event, max_depth=MAX_DEPTH) for event in events(decoded(response_bytes)))
    else:
        response = parsed(decoded(response_bytes), max_depth=MAX_DEPTH)
    user = request.pop("user", None)
    if redact is not None:
        request, response = _redacted(request, response, redact)
    if isinstance(user, str) and user and pseudonyms:
        request["user"] = pseudonyms(user)
    when = datetime.datetime.fromtimestamp(capture.time, datetime.UTC).isoformat(timespec="milliseconds")
    value = {"id": capture.id, "time": when, "path": _endpoint(capture.path), "request": request, "response": response}
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def events(stream: str) -> Iterator[str]:
    """Yield the data of server-sent events, except the final [DONE]."""
    for event in stream.replace("\r\n", "\n").split("\n\n"):
        data = "\n".join(line[5:].strip() for line in event.split("\n") if line.startswith("data:"))
        if data and data != "[DONE]":
            yield data


def _redacted(
    request: dict[str, Any], response: dict[str, Any], redact: Redact
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both without private data. Ids and log-probabilities are removed if they could spell it.

    Raises:
        Refused: The prompt is token ids only, and there is no tokenizer here to read them.
    """
    prompt = request.get("prompt")
    if isinstance(prompt, list) and any(isinstance(one, int | list) for one in prompt):
        raise Refused("ids_only", "the prompt is token ids only, and the recorder has no tokenizer to read them")
    request, response = _kept_of_request(request), _kept_of_answer(response)
    texts = _without(response, SPELLED)
    kept_request, kept_texts = (without_private(part, redact, max_depth=MAX_DEPTH) for part in (request, texts))
    choices = response.get("choices") or []
    # The ids would spell the arguments of tool calls.
    called = any(mapping(mapping(one, "choices").get("message") or {}, "message").get("tool_calls") for one in choices)
    changed = (kept_request, kept_texts) != (request, texts) or called
    if changed:
        return kept_request, kept_texts
    return kept_request, response | (
        {"choices": [_without_alternatives(_with_counts(one), redact) for one in choices]} if choices else {}
    )


def _with_counts(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice with numbers of draft tokens instead of their ids. Refused tokens spell text that no redaction has seen."""
    rounds = logged_rounds(choice.get("speculative"), "speculative")
    if rounds is None:
        return choice
    counts = {"drafted": [one.num_drafted for one in rounds], "accepted": [one.num_accepted for one in rounds]}
    return choice | {"speculative": counts}


def _kept_of_request(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with only the known keys of its turns. Of pictures and files only the type remains."""
    if not isinstance(request.get("messages"), list):
        return request
    return request | {"messages": [_kept_of_turn(turn) for turn in request["messages"]]}


def _kept_of_answer(response: dict[str, Any]) -> dict[str, Any]:
    kept = {key: response[key] for key in KEPT_OF_ANSWER if key in response}
    choices = response.get("choices")
    if isinstance(choices, list):
        kept["choices"] = [_kept_of_choice(mapping(one, "choices")) for one in choices]
    return kept


def _kept_of_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kept = {key: choice[key] for key in KEPT_OF_CHOICE if key in choice}
    return kept | ({"message": _kept_of_turn(kept["message"])} if "message" in kept else {})


def _kept_of_turn(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    kept = {key: turn[key] for key in KEPT_OF_TURN if key in turn}
    if isinstance(kept.get("content"), list):
        kept["content"] = [
            {key: part[key] for key in ("type", "text") if key in part} if isinstance(part, dict) else part
            for part in kept["content"]
        ]
    return kept


def _without_alternatives(choice: dict[str, Any], redact: Redact) -> dict[str, Any]:
    """Return a choice without its log-probabilities if the alternative tokens spell private data."""
    logged = choice.get("logprobs")
    if not isinstance(logged, dict):
        return choice
    if isinstance(logged.get("content"), list):
        rows = [mapping(row, "logprobs") for row in logged["content"]]
        tops = [[row, *(mapping(one, "logprobs") for one in row.get("top_logprobs") or [])] for row in rows]
        alternatives = [[str(one.get("token", "")) for one in row] for row in tops]
        # The bytes repeat the token.
        logged = _without(logged, ("bytes",))
    else:
        listed = zip(logged.get("tokens") or [], logged.get("top_logprobs") or [], strict=False)
        alternatives = [[str(token), *map(str, top or {})] for token, top in listed]
    if spells_private(alternatives, redact):
        return {key: value for key, value in choice.items() if key != "logprobs"}
    return choice | {"logprobs": logged}


def _endpoint(path: str) -> str:
    """Return the endpoint only: the rest of the path, or the query, may hold a key."""
    found = ENDPOINT.search(path.partition("?")[0])
    return found[0] if found else ""


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, keys) for key, part in value.items() if key not in keys}
    return [_without(part, keys) for part in value] if isinstance(value, list) else value
