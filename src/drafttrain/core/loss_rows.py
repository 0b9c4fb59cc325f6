"""The rows that a loss reads: drafter and target logits at the labels, and the quantities that losses are written in.

Values of rows have a known slope in the log-probabilities (`with_slope`), so the backward pass has one wide tensor and no mask.
On a CPU a mask that no branch can foresee (`where`, `masked_fill`, the gradient of `minimum`) costs twenty times a product.

N = rows, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossRows:
    """What a loss may look at: N rows of drafter and target logits over one vocabulary."""

    drafter_logits_NV: Tensor
    target_logits_NV: Tensor | None
    """None when the loss needs no target. Log-probabilities are logits too."""
    tokens_N: Tensor
    """The label: the token that the data has there; -1 where the drafter's vocabulary lacks it."""
    seed_N: Tensor | None = None
    """A number of the row, the same in every micro-batch, for losses that draw random numbers."""
    confidence_N: Tensor | None = None
    """The drafter's prediction whether its token is accepted, a logit; None: it predicts none."""
    target_is_normalised: bool = False
    """`target_logits_NV` are log-probabilities, float32 or wider."""

    @cached_property
    def log_p_NV(self) -> Tensor:
        """The target's log-probabilities, float32 or wider, without gradient; computed once."""
        assert self.target_logits_NV is not None, "the loss has needs_target, so its rows have the target's logits"
        given_NV = self.target_logits_NV.detach()
        return given_NV if self.target_is_normalised else _log_softmax(given_NV)

    @cached_property
    def p_NV(self) -> Tensor:
        """The target's probabilities."""
        return self.log_p_NV.exp()

    @cached_property
    def log_q_NV(self) -> Tensor:
        """The drafter's log-probabilities, float32 or wider, differentiable in its logits; computed once."""
        return _log_softmax(self.drafter_logits_NV)

    @cached_property
    def fixed_log_q_NV(self) -> Tensor:
        """The drafter's log-probabilities without gradient, for values whose slope is known (`with_slope`)."""
        return _log_softmax(self.drafter_logits_NV.detach())

    @cached_property
    def q_NV(self) -> Tensor:
        """The drafter's probabilities, without gradient."""
        return self.fixed_log_q_NV.exp()

    @cached_property
    def acceptance_N(self) -> Tensor:
        """The acceptance rate of each row, sum_x min(p, q) = 1 - TVD; differentiable in the drafter's logits."""
        if self._in_one_kernel is not None:
            return self._in_one_kernel[1]
        p_NV, q_NV = self.p_NV, self.q_NV
        # min(p, q) grows with q where q is less; where both are equal, half: the sign is 1, 0 or -1.
        return self.with_slope(
            torch.minimum(p_NV, q_NV).sum(dim=-1), lambda: (p_NV - q_NV).sign_().add_(1).mul_(q_NV).mul_(0.5)
        )

    @cached_property
    def forward_kl_N(self) -> Tensor:
        """KL(p || q) of each row, nats; differentiable in the drafter's logits."""
        if self._in_one_kernel is not None:
            return self._in_one_kernel[0]
        p_NV = self.p_NV
        return self.with_slope(kl_divergence(p_NV, self.log_p_NV, self.fixed_log_q_NV), lambda: -p_NV)

    @cached_property
    def cross_entropy_N(self) -> Tensor:
        """-log q(label) of each row, nats, 0 where the vocabulary lacks the label; differentiable in the drafter's logits."""
        log_q_NV = self.fixed_log_q_NV
        known_N1 = (self.tokens_N >= 0)[:, None]
        label_N1 = self.tokens_N.clamp_min(0)[:, None]
        value_N = torch.where(known_N1, -log_q_NV.gather(1, label_N1), 0.0)[:, 0]
        return self.with_slope(
            value_N, lambda: torch.zeros_like(log_q_NV).scatter_(1, label_N1, -known_N1.to(log_q_NV.dtype))
        )

    @cached_property
    def _in_one_kernel(self) -> tuple[Tensor, Tensor] | None:
        """Divergence and acceptance rate from one Triton kernel; None where no kernel exists for these rows."""
        if not has_kernel(self.drafter_logits_NV):
            return None
        # Imports Triton, which only builds of PyTorch for CUDA bring.
        from drafttrain.core.divergence_kernel import forward_kl_and_overlap

        return forward_kl_and_overlap(self.drafter_logits_NV, self.log_p_NV)

    def with_slope(self, value_N: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        """Return a function of `fixed_log_q_NV`, differentiable in the drafter's logits.

        Args:
            value_N: A function of the drafter's log-probabilities.
            slope: Computes slope_NV, the derivative of the value in each log-probability, as if they were independent; up to a
                multiple of the probabilities, which does not matter. It may hold tensors, never these rows: that would be a
                reference cycle, and wide tensors would stay in memory.
        """
        result: Tensor = _WithSlope.apply(self.drafter_logits_NV, self.q_NV, value_N, slope)
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


def kl_divergence(a_NV: Tensor, log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """Return KL(a || b) by row, without gradient; tokens without mass in `a` add nothing."""
    return (a_NV * log_ratio(log_a_NV, log_b_NV)).sum(dim=-1)


def log_ratio(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """Return log a - log b without gradient, a finite number where `a` has no mass."""
    return (log_a_NV.detach() - log_b_NV.detach()).nan_to_num_(nan=0.0, posinf=torch.inf)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(dim=-1)


def has_kernel(logits_NV: Tensor) -> bool:
    """Return whether a Triton kernel can compute these rows: on CUDA, where Triton is installed."""
    half_or_single = logits_NV.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return type(logits_NV) is Tensor and logits_NV.is_cuda and half_or_single and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
