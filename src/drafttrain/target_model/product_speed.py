"""How much faster this processor multiplies in bfloat16 than in float32: by the number of rows that meet the weights."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = (1, 6)
"""A plain call reads one token, a verification a few."""
TRAINED_ROWS = (256,)
"""A training step multiplies many rows at once: arithmetic decides there, not the reading of weights."""
NUM_WEIGHTS = 8 << 20
"""More than caches hold, as in a forward, where every weight is read once."""
MEASURED_SECONDS = 0.5


@functools.cache
@torch.no_grad()
def bfloat16_speedup(width: int, inner: int, rows: tuple[int, ...] = ROWS) -> float:
    """Return the time of products in float32 over that in bfloat16, on one thread.

    The types take turns, and the shortest time of each counts: other processes on the machine only make times longer.

    Args:
        width, inner: Columns and rows of the matrices.
        rows: Numbers of rows that are multiplied at once.
    """
    inner = min(inner, max(1, NUM_WEIGHTS // width))
    shape = (max(1, NUM_WEIGHTS // (width * inner)), inner, width)
    weights = {dtype: torch.ones(shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = {(dtype, count): float("inf") for dtype in weights for count in rows}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end = time.perf_counter() + MEASURED_SECONDS
        while time.perf_counter() < end or float("inf") in best.values():
            for dtype, count in best:
                best[dtype, count] = min(best[dtype, count], _seconds(weights[dtype], count))
    finally:
        torch.set_num_threads(threads)
    single, half = (sum(best[dtype, count] for count in rows) for dtype in weights)
    return single / half


def _seconds(weights: Tensor, rows: int) -> float:
    inputs = torch.ones(rows, weights.shape[-1], dtype=weights.dtype)
    began = time.perf_counter()
    for matrix in weights:
        linear(inputs, matrix)
    return time.perf_counter() - began
