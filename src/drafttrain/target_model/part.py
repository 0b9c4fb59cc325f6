"""The part of a causal LM that a call runs: all blocks, some of them, or the model without some sublayers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from drafttrain.core.weights import Weights
from drafttrain.target_model.ragged_cache import RaggedCache


@dataclass(frozen=True)
class Part:
    """The part of a model that a call runs."""

    name: str
    """Of the call, in the ledger."""
    caches: Sequence[RaggedCache]
    context: AbstractContextManager[None]
    """In which the model runs only this part."""
    num_layers: int
    running: range | None = None
    """The blocks; None: all."""
    without: Weights = Weights()
    """Of sublayers in these blocks that do not run."""
