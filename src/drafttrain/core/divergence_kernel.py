"""KL(p || q) and the overlap of p and q in one Triton kernel, and their gradient in another: logits are read three times in all.

In place of some twenty passes over tensors as wide as the vocabulary. Imported only where Triton is installed; on a CPU
Triton's interpreter runs it (TRITON_INTERPRET=1), which the tests do.

N = rows, V = vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns that a program reads at once."""


@triton.jit  # type: ignore[untyped-decorator]
def row_sums(logits, log_p, sums_5, columns, logits_stride, log_p_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write of one row: log-sum-exp of the logits, KL(p || q), sum min(p, q), mass of q where p is more, mass of p."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    log_p += row * log_p_stride
    places = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + places < columns
        z = tl.load(logits + start + places, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, z)
        # A lane that has seen nothing finite adds nothing.
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - safe) + tl.exp(z - safe)
        largest = new
    most = tl.max(largest, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(largest - most), 0))
    divergence = tl.zeros([BLOCK], tl.float32)
    overlap = tl.zeros([BLOCK], tl.float32)
    below = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + places < columns
        log_q = tl.load(logits + start + places, mask=inside, other=float("-inf")).to(tl.float32) - lse
        given = tl.load(log_p + start + places, mask=inside, other=float("-inf"))
        p, q = tl.exp(given), tl.exp(log_q)
        divergence += tl.where(p > 0, p * (given - log_q), 0.0)
        overlap += tl.minimum(p, q)
        below += tl.where(p > q, q, tl.where(p == q, 0.5 * q, 0.0))
        mass += p
    sums_5 += row * 5
    tl.store(sums_5, lse)
    tl.store(sums_5 + 1, tl.sum(divergence, 0))
    tl.store(sums_5 + 2, tl.sum(overlap, 0))
    tl.store(sums_5 + 3, tl.sum(below, 0))
    tl.store(sums_5 + 4, tl.sum(mass, 0))


@triton.jit  # type: ignore[untyped-decorator]
def row_gradients(  # type: ignore[no-untyped-def]
    logits, log_p, sums_5, slopes_2, gradient, columns, logits_stride, log_p_stride, BLOCK: tl.constexpr
):
    """Write a block of one row's gradient: slope of the divergence x (q mass - p) + slope of the overlap x (q below - q mass below)."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < columns
    lse = tl.load(sums_5 + row * 5)
    below = tl.load(sums_5 + row * 5 + 3)
    mass = tl.load(sums_5 + row * 5 + 4)
    of_divergence = tl.load(slopes_2 + row * 2)
    of_overlap = tl.load(slopes_2 + row * 2 + 1)
    z = tl.load(logits + row * logits_stride + places, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp(tl.load(log_p + row * log_p_stride + places, mask=inside, other=float("-inf")))
    q = tl.exp(z - lse)
    counted = tl.where(p > q, q, tl.where(p == q, 0.5 * q, 0.0))
    found = of_divergence * (q * mass - p) + of_overlap * (counted - q * below)
    tl.store(gradient + row * columns + places, found.to(gradient.dtype.element_ty), mask=inside)


def forward_kl_and_overlap(logits_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return (KL(p || q), sum min(p, q)) by row, float32, differentiable in the drafter's logits.

    Args:
        log_p_NV: The target's log-probabilities, float32.
    """
    divergence_N, overlap_N = _Sums.apply(logits_NV, log_p_NV)
    return divergence_N, overlap_N


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV, log_p_NV = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (logits_NV, log_p_NV))
        count, columns = logits_NV.shape
        sums_N5 = torch.empty(count, 5, device=logits_NV.device)
        strides = logits_NV.stride(0), log_p_NV.stride(0)
        row_sums[(count,)](logits_NV, log_p_NV, sums_N5, columns, *strides, BLOCK=BLOCK)
        ctx.save_for_backward(logits_NV, log_p_NV, sums_N5)
        return sums_N5[:, 1].clone(), sums_N5[:, 2].clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits_NV, log_p_NV, sums_N5 = ctx.saved_tensors
        count, columns = logits_NV.shape
        gradient_NV = torch.empty(count, columns, dtype=logits_NV.dtype, device=logits_NV.device)
        slopes_N2 = torch.stack(slopes, dim=1).float()
        row_gradients[(count, triton.cdiv(columns, BLOCK))](
            *(logits_NV, log_p_NV, sums_N5, slopes_N2, gradient_NV),
            *(columns, logits_NV.stride(0), log_p_NV.stride(0)),
            BLOCK=BLOCK,
        )
        return gradient_NV, None
