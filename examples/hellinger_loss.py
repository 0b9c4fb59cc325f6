"""A loss of your own, as a plugin: the squared Hellinger distance between the distributions p of the target and q of the drafter.

N = trained positions, V = vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses


@dataclass
class HellingerSettings:
    """Squared Hellinger distance."""

    scale: float = setting(1.0, help="Factor on the loss.", gt=0)


@losses.register("hellinger", HellingerSettings)
class Hellinger(Loss):
    """scale * (1 - sum sqrt(p q)), by row."""

    def __init__(self, settings: HellingerSettings) -> None:
        super().__init__()
        self.scale = settings.scale

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the distance of each row."""
        affinity_N = (0.5 * (rows.log_p_NV + rows.log_q_NV)).exp().sum(dim=-1)
        return {"loss": self.scale * (1 - affinity_N)}
