"""KL(target || drafter): covers all tokens that are likely under the target."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.losses import Loss, losses


@dataclass
class ForwardKLSettings:
    """KL(p || q): the drafter covers all tokens that are likely under the target. A good first choice for greedy decoding."""


@losses.register("forward_kl", ForwardKLSettings)
class ForwardKL(Loss):
    """sum_x p(x) log(p(x) / q(x)), nats. Source: Hinton et al. 2015; Zhou et al. 2023, DistillSpec, arXiv 2310.08461."""

    def __init__(self, settings: ForwardKLSettings | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the divergence of each row."""
        return {"loss": rows.forward_kl_N}
