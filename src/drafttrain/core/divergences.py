"""What the divergences are written in.

N = rows, V = vocabulary
"""

import torch
from torch import Tensor


def kl_divergence(a_NV: Tensor, log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """Return KL(a || b) by row, without gradient; tokens without mass in `a` add nothing."""
    return (a_NV * log_ratio(log_a_NV, log_b_NV)).sum(dim=-1)


def log_ratio(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """Return log a - log b without gradient, a finite number where `a` has no mass."""
    return (log_a_NV.detach() - log_b_NV.detach()).nan_to_num_(nan=0.0, posinf=torch.inf)
