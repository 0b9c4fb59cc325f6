"""RMS norm that keeps the type of its input, and for the backward pass its input alone.

D = hidden; ... any shape before it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm


class Norm(nn.RMSNorm):
    """states / root mean square * weight, reckoned in float32 or wider whatever the type of the states.

    Under autocast CUDA's norms would return float32 and keep a copy of that type, and each projection after them would cast and
    keep one of its own.
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
    """As PyTorch's kernel for CUDA; elsewhere it has none, and keeps five tensors."""

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
