"""Generalised Jensen-Shannon divergence: between the two KL directions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows, kl_divergence, log_ratio
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses


@dataclass
class JSDSettings:
    """Generalised Jensen-Shannon divergence, bounded."""

    beta: float = setting(
        0.5, help="Towards 0 the loss becomes beta x forward KL, towards 1 (1 - beta) x reverse KL.", gt=0, lt=1
    )


@losses.register("jsd", JSDSettings)
class JSD(Loss):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Source: Agarwal et al. 2023, arXiv 2306.13649; Zhou et al. 2023, DistillSpec, arXiv 2310.08461.
    """

    def __init__(self, settings: JSDSettings | None = None) -> None:
        super().__init__()
        self.beta = (settings or JSDSettings()).beta

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the divergence of each row."""
        log_p_NV, log_q_NV, q_NV, beta = rows.log_p_NV, rows.fixed_log_q_NV, rows.q_NV, self.beta
        log_m_NV = torch.logaddexp(log_p_NV + math.log(self.beta), log_q_NV + math.log1p(-self.beta))
        forward_N = kl_divergence(rows.p_NV, log_p_NV, log_m_NV)
        value_N = beta * forward_N + (1 - beta) * kl_divergence(q_NV, log_q_NV, log_m_NV)
        return {"loss": rows.with_slope(value_N, lambda: log_ratio(log_q_NV, log_m_NV).mul_(q_NV).mul_(1 - beta))}
