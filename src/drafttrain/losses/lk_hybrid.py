"""Forward KL while acceptance is low, total variation distance once it is high."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses


@dataclass
class LKHybridSettings:
    """Forward KL that turns into TVD as the acceptance rate grows."""

    rate: float = setting(3.0, help="The KL's share of a row is exp(-rate x acceptance rate).", gt=0)


@losses.register("lk_hybrid", LKHybridSettings)
class LKHybrid(Loss):
    """w KL(p || q) + (1 - w) TVD(p, q), w = exp(-rate sg[acceptance rate]) by row."""

    def __init__(self, settings: LKHybridSettings | None = None) -> None:
        super().__init__()
        self.rate = (settings or LKHybridSettings()).rate

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the loss of each row."""
        share_N = torch.exp(-self.rate * rows.acceptance_N.detach())
        return {"loss": share_N * rows.forward_kl_N + (1 - share_N) * (1 - rows.acceptance_N)}
