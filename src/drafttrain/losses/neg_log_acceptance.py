"""Negative log of the acceptance rate: TVD's optimum, with larger gradients where acceptance is low."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows, log_ratio
from drafttrain.losses import Loss, losses


@dataclass
class NegLogAcceptanceSettings:
    """-log acceptance rate: TVD that learns faster where the acceptance rate is still low."""


@losses.register("neg_log_acceptance", NegLogAcceptanceSettings)
class NegLogAcceptance(Loss):
    """-log sum_x min(p, q), nats."""

    def __init__(self, settings: NegLogAcceptanceSettings | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the loss of each row, finite even if the distributions do not overlap in float32."""
        log_p_NV, log_q_NV = rows.log_p_NV, rows.fixed_log_q_NV
        loss_N = -torch.logsumexp(torch.minimum(log_p_NV, log_q_NV), dim=-1)

        def slope() -> Tensor:
            share_NV = torch.minimum(log_p_NV, log_q_NV).add_(loss_N[:, None]).exp_()
            return log_ratio(log_p_NV, log_q_NV).sign_().add_(1).mul_(share_NV).mul_(-0.5)

        return {"loss": rows.with_slope(loss_N, slope)}
