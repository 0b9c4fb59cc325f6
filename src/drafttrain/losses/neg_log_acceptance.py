"""Negative log of the acceptance rate: TVD's optimum, with steps that grow where acceptance is low."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.records import LossRows
from drafttrain.losses import Loss, losses


@dataclass
class NegLogAcceptanceConfig:
    """-log acceptance rate: TVD that learns faster where the drafter is still bad."""


@losses.register("neg_log_acceptance", NegLogAcceptanceConfig)
class NegLogAcceptance(Loss):
    """-log sum_x min(p, q), nats."""

    def __init__(self, settings: NegLogAcceptanceConfig | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the loss of each row, finite also where the laws do not overlap in float32."""
        return {"loss": -torch.logsumexp(torch.minimum(rows.log_p_NV, rows.log_q_NV), dim=-1)}
