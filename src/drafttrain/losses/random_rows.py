"""Random numbers of a row: a pure function of its seed, in whichever batch the row is.

N = rows, S = numbers for each row
"""

import torch
from torch import Tensor

_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""The constants of splitmix64 (Steele et al. 2014) as signed 64-bit integers; products wrap."""


def uniform(seed_N: Tensor, count: int) -> Tensor:
    """Return uniforms_NS in [0, 1), float64."""
    return _shift(_hashed(seed_N, count), 11).double() / 2**53


def chosen(seed_N: Tensor, count: int, *, share: float) -> Tensor:
    """Return chosen_NS: each of S places is True with this probability. One hash decides four places, with 16 bits each."""
    bits_NS = _hashed(seed_N, -(-count // 4)).view(torch.int16)[:, :count]
    return bits_NS < round(share * 2**16) - 2**15


def _hashed(seed_N: Tensor, count: int) -> Tensor:
    """Return 64 random bits for each row and place."""
    x_NS = seed_N[:, None] * 1_000_003 + torch.arange(1, count + 1, device=seed_N.device)
    x_NS = x_NS * _ODD[0]
    x_NS = (x_NS ^ _shift(x_NS, 30)) * _ODD[1]
    x_NS = (x_NS ^ _shift(x_NS, 27)) * _ODD[2]
    return x_NS ^ _shift(x_NS, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without sign extension."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
