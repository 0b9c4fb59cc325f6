"""TVD++: total variation distance as a policy gradient, with the reward normalised to an advantage.

N = rows, V = vocabulary, S = samples a row
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.records import LossRows, RowIndex
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses
from drafttrain.losses.random_rows import uniform


@dataclass
class TVDPPConfig:
    """TVD with an advantage-normalised reward; serves sampling at temperature 1. Exact: its gradient is grad(TVD) / sigma."""

    estimator: Literal["exact", "sampled"] = setting(
        "exact", help="exact: expectation over the vocabulary; sampled: over num_samples tokens drawn from the drafter."
    )
    scope: Literal["position", "sequence", "batch"] = setting(
        "sequence", help="Rows over which the reward's mean and deviation are taken; batch: those of the step before."
    )
    num_samples: int = setting(1, help="sampled: tokens drawn a row.", ge=1)
    eps: float = setting(1e-6, help="Added to the deviation.", gt=0)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.estimator == "sampled" and self.scope == "position" and self.num_samples < 2:
            return ["num_samples: at least 2 with estimator 'sampled' and scope 'position', or the deviation is 0"]
        return []


@losses.register("tvdpp", TVDPPConfig)
class TVDPP(Loss):
    """-E_{x~q} [A(x) log q(x)] with A = (r - mu) / (sigma + eps), r(x) = 1 where p(x) > q(x); r, A and q are not differentiated.

    mu and sigma weigh rewards by the drafter's law. The reward is 0 or 1, so sigma^2 = mu (1 - mu) and one number a row, the
    mean reward, is all that a scope needs. Scope batch means a whole optimiser step on all ranks: the sums are gathered over
    micro-batches, and a step uses those of the step before (0.5, 0.5 at first), so that accumulation changes nothing.

    Source: Goel et al. 2024, Direct Alignment of Draft Model for Speculative Decoding, arXiv 2403.00858.
    """

    previous_mean: Tensor
    sums_2: Tensor

    def __init__(self, settings: TVDPPConfig | None = None) -> None:
        super().__init__()
        self.settings = settings or TVDPPConfig()
        self.register_buffer("previous_mean", torch.tensor(0.5))
        self.register_buffer("sums_2", torch.zeros(2, dtype=torch.float64))

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return of each row the rewarded sum, the unrewarded sum, and the mean reward."""
        log_p_NV, log_q_NV = rows.log_p_NV, rows.log_q_NV
        if self.settings.estimator == "exact":
            weight_NV = log_q_NV.detach().exp()
        else:
            tokens_NS = _drawn(log_q_NV.detach(), rows, self.settings.num_samples)
            log_p_NV, log_q_NV = log_p_NV.gather(-1, tokens_NS), log_q_NV.gather(-1, tokens_NS)
            weight_NV = torch.full_like(log_q_NV, 1 / self.settings.num_samples).detach()
        rewarded_NV = weight_NV * (log_p_NV > log_q_NV.detach())
        return {
            "rewarded": -_dot(rewarded_NV, log_q_NV),
            "all": -_dot(weight_NV, log_q_NV),
            "mean_reward": rewarded_NV.sum(dim=-1),
        }

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return the loss of each row: (rewarded - mu all) / (sigma + eps)."""
        mean_N = self._mean(values["mean_reward"].detach(), index)
        sigma_N = (mean_N * (1 - mean_N)).clamp_min(0).sqrt()
        return (values["rewarded"] - mean_N * values["all"]) / (sigma_N + self.settings.eps)

    def _mean(self, reward_N: Tensor, index: RowIndex) -> Tensor:
        if self.settings.scope == "position":
            return reward_N
        if self.settings.scope == "sequence":
            _, group_N, count_G = torch.unique(index.sequence_N, return_inverse=True, return_counts=True)
            total_G = reward_N.new_zeros(len(count_G)).index_add(0, group_N, reward_N)
            return (total_G / count_G)[group_N]
        if self.training:
            self.sums_2 += torch.stack([reward_N.sum().double(), self.sums_2.new_tensor(float(len(reward_N)))])
        return self.previous_mean.to(reward_N.dtype).expand_as(reward_N)

    @torch.no_grad()
    def end_of_step(self) -> None:
        """Make this step's mean, over all ranks, the next step's."""
        if self.settings.scope != "batch":
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums_2)
        if self.sums_2[1] > 0 and torch.isfinite(self.sums_2).all():
            self.previous_mean.copy_(self.sums_2[0] / self.sums_2[1])
        self.sums_2.zero_()


def _dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """Return the products of two rows, without a tensor of all terms."""
    return torch.einsum("nv,nv->n", a_NV, b_NV)


def _drawn(log_q_NV: Tensor, rows: LossRows, count: int) -> Tensor:
    """Return tokens_NS drawn from the drafter, the same for a row whatever micro-batch it is in."""
    assert rows.seed_N is not None, "align gives every row its seed"
    below_NV = log_q_NV.double().exp().cumsum(dim=-1)
    total_N1 = below_NV[:, -1:]
    samples_NS = uniform(rows.seed_N, count) * total_N1
    return torch.searchsorted(below_NV, samples_NS, right=True).clamp(max=log_q_NV.shape[-1] - 1)
