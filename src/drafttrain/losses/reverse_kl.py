"""KL(drafter || target): seeks the tokens that the target is sure of."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from drafttrain.core.loss_rows import LossRows, kl_divergence, log_ratio
from drafttrain.losses import Loss, losses


@dataclass
class ReverseKLSettings:
    """KL(q || p): the drafter avoids tokens that are unlikely under the target."""


@losses.register("reverse_kl", ReverseKLSettings)
class ReverseKL(Loss):
    """sum_x q(x) log(q(x) / p(x)), nats. Source: Zhou et al. 2023, DistillSpec, arXiv 2310.08461."""

    def __init__(self, settings: ReverseKLSettings | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the divergence of each row."""
        log_p_NV, log_q_NV, q_NV = rows.log_p_NV, rows.fixed_log_q_NV, rows.q_NV
        return {
            "loss": rows.with_slope(
                kl_divergence(q_NV, log_q_NV, log_p_NV), lambda: log_ratio(log_q_NV, log_p_NV).mul_(q_NV)
            )
        }
