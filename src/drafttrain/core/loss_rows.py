"""The rows that a loss reads: drafter and target logits at the labels.

B = sequences, T = positions, V = vocabulary, D = hidden, K = draft depth, N = rows (trained positions, or nodes of a tree)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossRows:
    """What a loss may look at: N rows of drafter and target logits over one vocabulary."""

    drafter_logits_NV: Tensor
    target_logits_NV: Tensor | None
    """None when the loss asked for no target. Log-probabilities are logits too."""
    tokens_N: Tensor
    """The label: the token that the data has there; -1 where the drafter's vocabulary lacks it."""
    seed_N: Tensor | None = None
    """A number of the row, the same whatever micro-batch it is in, for losses that draw."""
    target_is_normalised: bool = False
    """`target_logits_NV` are log-probabilities, float32 or wider."""

    @cached_property
    def log_p_NV(self) -> Tensor:
        """The target's log-probabilities, float32 or wider, without gradient; computed once for all who ask."""
        assert self.target_logits_NV is not None, "the loss says needs_target, so its rows have the target's"
        given_NV = self.target_logits_NV.detach()
        return given_NV if self.target_is_normalised else _log_softmax(given_NV)

    @cached_property
    def p_NV(self) -> Tensor:
        """The target's probabilities."""
        return self.log_p_NV.exp()

    @cached_property
    def log_q_NV(self) -> Tensor:
        """The drafter's log-probabilities, float32 or wider, differentiable in its logits; computed once for all who ask."""
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
        import torch

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
        from drafttrain.core.divergences import kl_divergence

        if self._in_one_kernel is not None:
            return self._in_one_kernel[0]
        p_NV = self.p_NV
        return self.with_slope(kl_divergence(p_NV, self.log_p_NV, self.fixed_log_q_NV), lambda: -p_NV)

    @cached_property
    def _in_one_kernel(self) -> tuple[Tensor, Tensor] | None:
        """Divergence and acceptance rate from one kernel; None: where there is none for these rows."""
        from drafttrain.core.kernels import has_kernel

        if not has_kernel(self.drafter_logits_NV):
            return None
        from drafttrain.core.divergence_kernel import forward_kl_and_overlap

        return forward_kl_and_overlap(self.drafter_logits_NV, self.log_p_NV)

    def with_slope(self, value_N: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        """Return a function of `fixed_log_q_NV` whose slope is known, differentiable in the drafter's logits.

        Args:
            slope: See `core.slopes.with_slope`; it may hold tensors of these rows, but not the rows.
        """
        from drafttrain.core.slopes import with_slope

        return with_slope(self.drafter_logits_NV, self.q_NV, value_N, slope)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    import torch

    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(dim=-1)
