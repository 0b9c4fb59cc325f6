"""Run with TRITON_INTERPRET=1 (Triton reads it on import): prints the kernel's numbers and PyTorch's, as JSON."""

import json

import torch
from torch import Tensor

from drafttrain.core import divergence_kernel as kernel
from drafttrain.core.loss_rows import LossRows


def rows(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits, some far apart, and log-probabilities with an exactly matched row and a zero-probability token."""
    generator = torch.Generator().manual_seed(columns)
    logits_NV = (4 * torch.randn(6, columns + 3, generator=generator)).to(dtype)
    log_p_NV = (4 * torch.randn(6, columns, generator=generator)).log_softmax(-1)
    log_p_NV[0] = logits_NV[0, :columns].float().log_softmax(-1)
    log_p_NV[1, 2] = -torch.inf
    logits_NV[2, 0] = 90
    return logits_NV[:, :columns].requires_grad_(), log_p_NV


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    assert torch.isfinite(one).all()
    return float((one.float() - other.float()).abs().max() / other.abs().max())


def compared(columns: int, dtype: torch.dtype) -> dict[str, float]:
    """Return how far the kernel is from PyTorch."""
    logits_NV, log_p_NV = rows(columns, dtype)
    plain = LossRows(logits_NV, log_p_NV, torch.zeros(6, dtype=torch.long), target_is_normalised=True)
    wanted = plain.forward_kl_N, plain.acceptance_N
    found = kernel.forward_kl_and_overlap(logits_NV, log_p_NV)
    made = {name: difference(a, b) for name, a, b in zip(("divergence", "overlap"), found, wanted, strict=True)}
    slopes_2N = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    # Of equal probabilities rounding decides which is less, so no slope of the overlap at the row that is met exactly.
    slopes_2N[1, 0] = 0
    gradients = [
        torch.autograd.grad(
            sum((slope_N * sum_N).sum() for slope_N, sum_N in zip(slopes_2N, sums, strict=True)), logits_NV
        )
        for sums in (found, wanted)
    ]
    made["gradient"] = difference(gradients[0][0], gradients[1][0])
    # What a sign that is wrong would look like.
    made["planted"] = difference(-gradients[0][0], gradients[1][0])
    return made


if __name__ == "__main__":
    kernel.BLOCK = 64
    kinds = (torch.float32, torch.bfloat16)
    print(json.dumps({f"{kind} {columns}": compared(columns, kind) for kind in kinds for columns in (7, 64, 200)}))
