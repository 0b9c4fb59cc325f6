"""What the divergences are written in.

N = rows, V = vocabulary
"""

import torch
from torch import Tensor


def kl_divergence(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """Return KL(a || b) by row; tokens without mass in `a` add nothing."""
    terms_NV = log_a_NV.exp() * (log_a_NV - log_b_NV)
    return terms_NV.masked_fill(log_a_NV == -torch.inf, 0.0).sum(dim=-1)
