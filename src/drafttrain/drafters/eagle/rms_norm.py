"""RMS norm that returns the type of its input, and stores only the input for the backward pass.

D = hidden; ... any shape before it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm


class Norm(nn.RMSNorm):
    """states / root mean square * weight, computed in float32 or wider.

    Under autocast CUDA's norms return float32 and store a float32 copy, and each projection after them casts and stores
    another copy.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Return normed states of the same type."""
        weight_D = self.weight.to(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            if states.is_cuda:
                return rms_norm(states, self.normalized_shape, weight_D, self.eps)
            normed: Tensor = _Normed.apply(states, weight_D, self.eps)
        return normed


class _Normed(torch.autograd.Function):
    """Like PyTorch's CUDA kernel. Elsewhere PyTorch has no fused kernel, and stores five tensors."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _wide(states)
        factor = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(states, factor, weight_D)
        return (wide * factor).mul_(weight_D).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        states, factor, weight_D = ctx.saved_tensors
        normed, wide = _wide(states) * factor, _wide(gradient)
        in_weight_D = (wide * normed).flatten(0, -2).sum(dim=0)
        in_normed = wide * weight_D
        drift = (in_normed * normed).mean(dim=-1, keepdim=True)
        in_states = in_normed.sub_(normed.mul_(drift)).mul_(factor)
        return in_states.to(states.dtype), in_weight_D.to(weight_D.dtype), None


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
