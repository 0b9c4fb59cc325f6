"""TVD++: total variation distance as a policy gradient, with the reward normalised to an advantage.

N = rows, V = vocabulary, S = samples for each row
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss, losses
from drafttrain.losses.groups import groups
from drafttrain.losses.random_rows import uniform


@dataclass
class TVDPPSettings:
    """TVD with an advantage-normalised reward; serves sampling at temperature 1. Exact: its gradient is grad(TVD) / sigma."""

    estimator: Literal["exact", "sampled"] = setting(
        "exact", help="exact: expectation over the vocabulary; sampled: over num_samples tokens drawn from the drafter."
    )
    scope: Literal["position", "sequence", "batch"] = setting(
        "sequence",
        help="Rows over which the reward's mean and standard deviation are computed; batch: all rows of the previous step.",
    )
    num_samples: int = setting(1, help="sampled: tokens drawn for each row.", ge=1)
    eps: float = setting(1e-6, help="Added to the standard deviation.", gt=0)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.estimator == "sampled" and self.scope == "position" and self.num_samples < 2:
            return ["num_samples: at least 2 with estimator 'sampled' and scope 'position', or the deviation is 0"]
        return []


@losses.register("tvdpp", TVDPPSettings)
class TVDPP(Loss):
    """-E_{x~q} [A(x) log q(x)] with A = (r - mu) / (sigma + eps), r(x) = 1 where p(x) > q(x); r, A and q are not differentiated.

    mu and sigma weigh rewards by the drafter's distribution. The reward is 0 or 1, so sigma^2 = mu (1 - mu), and a scope needs only
    the mean reward of each row. Scope batch means a whole optimizer step on all ranks: the sums are accumulated over
    micro-batches, and a step uses those of the previous step (0.5, 0.5 at first), so that accumulation changes nothing.

    Source: Goel et al. 2024, Direct Alignment of Draft Model for Speculative Decoding, arXiv 2403.00858.
    """

    previous_mean: Tensor
    sums_2: Tensor

    def __init__(self, settings: TVDPPSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or TVDPPSettings()
        self.register_buffer("previous_mean", torch.tensor(0.5))
        self.register_buffer("sums_2", torch.zeros(2, dtype=torch.float64))

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the rewarded sum, the sum of all, and the mean reward of each row."""
        return self._expected(rows) if self.settings.estimator == "exact" else self._sampled(rows)

    def _expected(self, rows: LossRows) -> Mapping[str, Tensor]:
        p_NV, q_NV, log_q_NV = rows.p_NV, rows.q_NV, rows.fixed_log_q_NV
        rewarded_NV = _reward(p_NV, q_NV).mul_(q_NV)
        return {
            "rewarded": rows.with_slope(
                -(rewarded_NV * log_q_NV).sum(dim=-1), lambda: _reward(p_NV, q_NV).mul_(q_NV).neg_()
            ),
            # Its gradient is 0: with weights q, sum_x q(x) grad log q(x) = 0.
            "all": -(q_NV * log_q_NV).sum(dim=-1),
            "mean_reward": rewarded_NV.sum(dim=-1),
        }

    def _sampled(self, rows: LossRows) -> Mapping[str, Tensor]:
        tokens_NS = _drawn(rows.fixed_log_q_NV, rows, self.settings.num_samples)
        log_p_NS, log_q_NS = rows.log_p_NV.gather(-1, tokens_NS), rows.log_q_NV.gather(-1, tokens_NS)
        rewarded_NS = (log_p_NS > log_q_NS.detach()) / self.settings.num_samples
        return {
            "rewarded": -(rewarded_NS * log_q_NS).sum(dim=-1),
            "all": -log_q_NS.mean(dim=-1),
            "mean_reward": rewarded_NS.to(log_q_NS.dtype).sum(dim=-1),
        }

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return the loss of each row: (rewarded - mu all) / (sigma + eps)."""
        mean_N = self._mean(values["mean_reward"].detach(), index)
        sigma_N = (mean_N * (1 - mean_N)).clamp_min(0).sqrt()
        return (values["rewarded"] - mean_N * values["all"]) / (sigma_N + self.settings.eps)

    @property
    def pointwise(self) -> bool:
        """Whether a row's loss needs no other row of its micro-batch."""
        return self.settings.scope != "sequence"

    def _mean(self, reward_N: Tensor, index: RowIndex) -> Tensor:
        if self.settings.scope == "position":
            return reward_N
        counted_N = torch.ones_like(reward_N) if index.learnable_N is None else index.learnable_N.to(reward_N.dtype)
        if self.settings.scope == "sequence":
            group_N = groups(index.sequence_N)
            total_G, count_G = (
                torch.zeros_like(reward_N).index_add(0, group_N, part_N) for part_N in (reward_N * counted_N, counted_N)
            )
            return (total_G / count_G.clamp_min(1))[group_N]
        if self.training:
            self.sums_2 += torch.stack([(reward_N * counted_N).sum(), counted_N.sum()])
        return self.previous_mean.to(reward_N.dtype).expand_as(reward_N)

    @torch.no_grad()
    def end_of_step(self) -> None:
        """Store this step's mean over all ranks for the next step."""
        if self.settings.scope != "batch":
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums_2)
        mean = (self.sums_2[0] / self.sums_2[1]).to(self.previous_mean.dtype)
        self.previous_mean.copy_(torch.where(torch.isfinite(mean), mean, self.previous_mean))
        self.sums_2.zero_()


def _reward(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """Return 1 where p > q, else 0; without a mask, which a CPU computes slowly."""
    return (p_NV - q_NV).sign_().clamp_min_(0)


def _drawn(log_q_NV: Tensor, rows: LossRows, count: int) -> Tensor:
    """Return tokens_NS drawn from the drafter; the draws of a row do not depend on its micro-batch."""
    assert rows.seed_N is not None, "align gives every row its seed"
    below_NV = log_q_NV.double().exp().cumsum(dim=-1)
    total_N1 = below_NV[:, -1:]
    samples_NS = uniform(rows.seed_N, count) * total_N1
    return torch.searchsorted(below_NV, samples_NS, right=True).clamp(max=log_q_NV.shape[-1] - 1)
