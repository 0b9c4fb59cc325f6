"""How much faster this processor multiplies in bfloat16 than in float32: decoding is products of a few rows with many weights."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = (1, 6)
"""A plain call reads one token, a verification a few."""
NUM_WEIGHTS = 8 << 20
"""More than caches hold, as in a forward, where every weight is read once."""
MEASURED_SECONDS = 0.5


@functools.cache
@torch.no_grad()
def bfloat16_speedup(width: int, inner: int) -> float:
    """Return the time of products in float32 over that in bfloat16, on one thread.

    The types take turns, and the shortest time of each counts: other processes on the machine only make times longer.

    Args:
        width, inner: Columns and rows of the matrices.
    """
    inner = min(inner, max(1, NUM_WEIGHTS // width))
    shape = (max(1, NUM_WEIGHTS // (width * inner)), inner, width)
    weights = {dtype: torch.ones(shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = {(dtype, rows): float("inf") for dtype in weights for rows in ROWS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end = time.perf_counter() + MEASURED_SECONDS
        while time.perf_counter() < end or float("inf") in best.values():
            for dtype, rows in best:
                best[dtype, rows] = min(best[dtype, rows], _seconds(weights[dtype], rows))
    finally:
        torch.set_num_threads(threads)
    single, half = (sum(best[dtype, rows] for rows in ROWS) for dtype in weights)
    return single / half


def _seconds(weights: Tensor, rows: int) -> float:
    inputs = torch.ones(rows, weights.shape[-1], dtype=weights.dtype)
    began = time.perf_counter()
    for matrix in weights:
        linear(inputs, matrix)
    return time.perf_counter() - began
