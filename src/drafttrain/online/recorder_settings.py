"""Settings of the recorder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
    record_bytes: int = 32 * 2**20
    """Request and answer together; what is longer passes and is not recorded."""
    queue_bytes: int = 256 * 2**20
    """What waits to be written; beyond it records are dropped."""
    grace_seconds: float = 30.0
    """How long open requests may take after SIGTERM."""
