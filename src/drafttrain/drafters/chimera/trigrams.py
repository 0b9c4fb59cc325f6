"""Which tokens a trigram state reads.

B = sequences, T = positions, 3 = the token two places before, the one before, the token itself
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SIZE = 3
"""Tokens of a trigram."""


def trigrams(tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Return tokens_BT3: every token after the two before it. A document's first token stands for those before it."""
    flat_N, position_N = tokens_BT.flatten(), positions_BT.flatten()
    found = [flat_N]
    for back in range(1, SIZE):
        found.insert(0, torch.where(position_N >= back, flat_N.roll(back), found[0]))
    return torch.stack(found, dim=-1).view(*tokens_BT.shape, SIZE)


def last_trigram(text: Sequence[int]) -> list[int]:
    """Return the trigram of the last token of a text."""
    last = list(text[-SIZE:])
    return [last[0]] * (SIZE - len(last)) + last
