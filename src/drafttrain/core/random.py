"""Random streams named by their purpose, so that no draw depends on the order of other draws."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *names: object) -> int:
    """Return a 63-bit seed that is a pure function of (seed, names)."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: object) -> torch.Generator:
    """Return a fresh CPU generator for (seed, names)."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *names))
