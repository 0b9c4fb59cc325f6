"""A drafter folder in memory, in any format: every exporter and importer converts between these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter folder in memory: its kind, config.json, and the tensors of model.safetensors."""

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = field(default=())
    """What a format changed, in words."""
    folder: Path | None = field(default=None, compare=False)
    """The folder that they were read from, which holds the tokenizer; of a part of a checkpoint, the folder of the rest."""
