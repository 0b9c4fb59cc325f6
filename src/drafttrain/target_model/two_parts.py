"""Whether a model that runs in two parts, first blocks and others, gives the logits that it gives as a whole."""

from __future__ import annotations

from typing import Any

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import LayerState

PARTS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest differences, relative to the largest logit, that the rounding of two calls explains."""


def refuse_if_not_same_in_two_parts(lm: Any, *, takes_positions: bool) -> None:
    """Refuse a model whose outputs change when its first blocks run on their own.

    Args:
        lm: A `CachedLM` that is split; its cache is emptied.

    Raises:
        CheckpointError: They change, or it cannot be run in two parts.
    """
    what = f"{lm.name}: {type(lm.model).__name__}"
    try:
        same = is_same_in_two_parts(lm, takes_positions=takes_positions)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{what} cannot be run in two parts at block {lm.split}: {error}") from error
    if not same:
        raise CheckpointError(f"{what} gives other logits when it is run in two parts at block {lm.split}")


def is_same_in_two_parts(lm: Any, *, takes_positions: bool) -> bool:
    """Return whether running the first blocks token by token, then the others at once, gives the logits of one call.

    Args:
        lm: A `CachedLM` that is split; its cache is emptied.
    """
    if not takes_positions:
        raise CheckpointError("it takes no position_ids")
    context, nodes = [0, 1, 2], [2, 1, 0]
    lm.begin([context])
    states = [lm.run_first_blocks([[node]])[0].hidden_ND for node in nodes]
    (parts,) = lm.forward([nodes], resume=[LayerState(lm.split or 0, torch.cat(states))])
    lm.begin([context])
    (whole,) = lm.forward([nodes])
    scale = float(whole.logits_BTV.abs().max())
    difference = float((parts.logits_BTV - whole.logits_BTV).abs().max())
    return difference <= PARTS_TOLERANCE[lm.model.dtype] * scale
