"""The next draft token of each sequence: sampled or greedy.

N = sequences that draft, V = the drafter's vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.core.probability import draw_each, sampling_probs
from drafttrain.core.texts import Sampling


def next_tokens(
    logits: Sequence[Tensor], sampling: Sampling, generators: Sequence[torch.Generator], *, fixed: bool
) -> tuple[list[int], list[Tensor | None]]:
    """Return the next token of each sequence, and the distribution it was drawn from. The device is read once for all.

    Args:
        logits: logits_V of each sequence.
        generators: One per sequence, for its draw.
        fixed: Take the likeliest token; its distribution is None.
    """
    if not logits:
        return [], []
    logits_NV = logits[0][None] if len(logits) == 1 else torch.stack(list(logits))
    if fixed:
        # Not `argmax`, whose kernel for bfloat16 takes several times as long. Both return the first of equal maxima.
        likeliest: list[int] = logits_NV.max(dim=-1).indices.tolist()
        return likeliest, [None] * len(likeliest)
    probs_NV = sampling_probs(logits_NV, sampling)
    return draw_each(probs_NV, generators), list(probs_NV)
