"""Max-pooling of scores along a prompt: neighbours of an important token are important too."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import max_pool1d, pad


def pooled(score_GP: Tensor, size: int) -> Tensor:
    """Return, for each token, the largest score among `size` tokens around it. Scores are 0 or more.

    Of an even number, one more is behind the token than before it.
    """
    if not score_GP.shape[1]:
        return score_GP
    before = (size - 1) // 2
    pooled_GP: Tensor = max_pool1d(pad(score_GP[None], (before, size - 1 - before)), size, stride=1)[0]
    return pooled_GP
