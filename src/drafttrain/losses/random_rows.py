"""Random numbers that belong to a row: a pure function of its seed, whatever batch the row is in.

N = rows, S = numbers a row
"""

import torch
from torch import Tensor

_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""The constants of splitmix64 (Steele et al. 2014) as signed 64-bit integers; products wrap."""


def uniform(seed_N: Tensor, count: int) -> Tensor:
    """Return uniforms_NS in [0, 1), float64."""
    x_NS = seed_N[:, None] * 1_000_003 + torch.arange(1, count + 1, device=seed_N.device)
    x_NS = x_NS * _ODD[0]
    x_NS = (x_NS ^ _shift(x_NS, 30)) * _ODD[1]
    x_NS = (x_NS ^ _shift(x_NS, 27)) * _ODD[2]
    x_NS = x_NS ^ _shift(x_NS, 31)
    return _shift(x_NS, 11).double() / 2**53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
