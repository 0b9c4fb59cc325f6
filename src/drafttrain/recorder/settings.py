"""Settings of the recorder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECORD_BYTES = 32 * 2**20


@dataclass(frozen=True)
class RecorderSettings:
    """Where the recorder forwards requests, and what it records."""

    upstream: str
    """Address of the server, such as http://127.0.0.1:8000."""
    out: Path
    """Folder of the records."""
    port: int
    """0: any free port."""
    host: str = "127.0.0.1"
    logprobs: int = 0
    """Log-probabilities per token to request if the client requests none; 0: none."""
    token_ids: bool = False
    """Request token ids (vLLM's return_token_ids)."""
    redact: bool = True
    redact_with: str | None = None
    rotate_bytes: int = 256 * 2**20
    """A larger file of records is closed, and the next one is opened."""
    record_bytes: int = RECORD_BYTES
    """Limit of request and answer together, as sent and decompressed. Longer ones are relayed and not recorded."""
    queue_bytes: int = 256 * 2**20
    """Limit of the records that wait to be written, and another one of unfinished exchanges. Beyond it, records are dropped."""
    grace_seconds: float = 30.0
    """Time after SIGTERM for open requests to finish and for waiting records to be written."""
    request_seconds: float = 60.0
    """How long a client may take to send the head of a request, and how long its body may pause."""
    max_clients: int = 8192
    """Connections at once. More receive 503. Each needs two open files."""
