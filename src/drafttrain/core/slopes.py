"""Numbers of rows whose slope in the log-probabilities is known: the backward pass has one wide tensor and no mask.

On a CPU a mask that no branch can foresee (`where`, `masked_fill`, the gradient of `minimum`) costs twenty times a product.

N = rows, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def with_slope(logits_NV: Tensor, probs_NV: Tensor, value_N: Tensor, slope: Callable[[], Tensor]) -> Tensor:
    """Return value_N, differentiable in the logits.

    Args:
        probs_NV: softmax of the logits.
        value_N: A function of their log-softmax.
        slope: Makes slope_NV, the derivative of the value in each log-probability, as if they were free of each other; up to a
            multiple of the probabilities, which does not matter. It may hold tensors, never what holds the value: that would be
            a circle, and wide tensors would stay.
    """
    result: Tensor = _WithSlope.apply(logits_NV, probs_NV, value_N, slope)
    return result


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, probs_NV: Tensor, value_N: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(probs_NV)
        ctx.slope = slope
        ctx.dtype = logits_NV.dtype
        return value_N.clone()

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (probs_NV,) = ctx.saved_tensors
        slope_NV = ctx.slope()
        # The probabilities add up to 1, whatever the logits are.
        gradient_NV = torch.addcmul(slope_NV, probs_NV, slope_NV.sum(dim=-1, keepdim=True), value=-1)
        return gradient_NV.mul_(gradient_N[:, None]).to(ctx.dtype), None, None, None
