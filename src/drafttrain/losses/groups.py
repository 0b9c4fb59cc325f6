"""Numbers of groups of rows, without waiting for the device to know how many there are.

N = rows
"""

import torch
from torch import Tensor


def groups(ids_N: Tensor) -> Tensor:
    """Return group_N, the rank of each id among the distinct ids, from 0 to at most N - 1."""
    sorted_N, order_N = ids_N.sort(stable=True)
    ranks_N = torch.zeros_like(sorted_N)
    ranks_N[1:] = (sorted_N[1:] != sorted_N[:-1]).cumsum(0)
    return torch.empty_like(ranks_N).scatter(0, order_N, ranks_N)
