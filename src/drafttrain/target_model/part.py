"""The part of a causal LM that a call runs: all blocks, some of them, or the model without some sublayers; what a call returns.

B = sequences, N = tokens of the longest one, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from drafttrain.core.target_rows import TargetOutput
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


def by_sequence(
    logits_BNV: Tensor | None, seen: Mapping[int | str, Tensor], sizes: Sequence[int]
) -> list[TargetOutput]:
    """Return the outputs of each sequence as a batch of one, without padding.

    Args:
        seen: The states of `taps`.
    """
    states = {int(index): state_BND for index, state_BND in seen.items() if index != "final"}
    final_BND = seen.get("final")
    return [
        TargetOutput(
            logits_BTV=None if logits_BNV is None else logits_BNV[row : row + 1, :size],
            hidden_BTD={index: state_BND[row : row + 1, :size] for index, state_BND in states.items()},
            final_BTD=None if final_BND is None else final_BND[row : row + 1, :size],
        )
        for row, size in enumerate(sizes)
    ]
