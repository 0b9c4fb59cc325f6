"""Settings of the recorder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECORD_BYTES = 32 * 2**20


@dataclass(frozen=True)
class RecorderSettings:
    """What the recorder stands before, and what it may keep."""

    upstream: str
    """Address of the server, such as http://127.0.0.1:8000."""
    out: Path
    """Folder of the records."""
    port: int
    """0: a free one."""
    host: str = "127.0.0.1"
    logprobs: int = 0
    """Log-probabilities that are asked for at each token where the client asks for none; 0: none."""
    token_ids: bool = False
    """Ask for token ids (return_token_ids, as vLLM knows it)."""
    redact: bool = True
    redact_with: str | None = None
    rotate_bytes: int = 256 * 2**20
    """A file of records that is larger is closed, and the next one begun."""
    record_bytes: int = RECORD_BYTES
    """Request and answer together, as they pass and unpacked; what is longer passes and is not recorded."""
    queue_bytes: int = 256 * 2**20
    """What waits to be written, and once more what is on its way; beyond it records are dropped."""
    grace_seconds: float = 30.0
    """After SIGTERM open requests may take so long, and all that waits is written."""
    request_seconds: float = 60.0
    """How long a client may take to send the head of a request, and how long its body may pause."""
    max_clients: int = 8192
    """Connections at once; more are answered with 503. Each needs two open files."""
