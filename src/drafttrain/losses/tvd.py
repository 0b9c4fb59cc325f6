"""Total variation distance: exactly one minus the acceptance rate at temperature 1."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.losses import Loss, losses


@dataclass
class TVDSettings:
    """1 - acceptance rate: the chance that a draft token is rejected at temperature 1."""


@losses.register("tvd", TVDSettings)
class TVD(Loss):
    """0.5 sum_x |p - q| = 1 - sum_x min(p, q). Source: Leviathan et al. 2022, arXiv 2211.17192, 3.2."""

    def __init__(self, settings: TVDSettings | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the distance of each row."""
        return {"loss": 1 - rows.acceptance_N}
