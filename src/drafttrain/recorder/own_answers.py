"""Answers that the recorder writes itself: its status page and errors in the form of the OpenAI protocol."""

from __future__ import annotations

import json
from typing import Any

STATUS_PATH = "/_recorder"
"""The recorder answers this path itself, with its counts as JSON."""
LOOP_HEADER = b"Drafttrain-Recorder"
"""Names each recorder that forwarded a request. Not Via: some servers stop compressing when they see it."""
REASONS = {
    400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 502: "Bad Gateway", 503: "Service Unavailable",
    508: "Loop Detected",
}  # fmt: skip


def error_answer(status: int, reason: str, *headers: str) -> bytes:
    """Return an error answer, which ends the connection."""
    kind = REASONS[status].lower().replace(" ", "_")
    body = json.dumps({"error": {"message": f"recorder: {reason}", "type": kind}}).encode()
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_answer(counts: dict[str, Any], *, with_body: bool) -> bytes:
    """Return the status page, which ends the connection; an answer to HEAD has no body."""
    body = json.dumps(counts).encode() if with_body else b""
    lines = f"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    return lines.encode() + b"Connection: close\r\n\r\n" + body
