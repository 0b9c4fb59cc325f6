"""Cross-entropy with the token that the data has: hard labels, no target needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses


@dataclass
class CrossEntropySettings:
    """Cross-entropy with the token in the data; needs no target."""

    smoothing: float = setting(
        0.0, help="Label smoothing: this share of the label is spread evenly over the vocabulary.", ge=0, lt=1
    )


@losses.register("ce", CrossEntropySettings)
class CrossEntropy(Loss):
    """-(1 - s) log q(label) - s mean_v log q(v), nats, with label smoothing s.

    Source of the smoothing: Szegedy et al. 2015, Rethinking the Inception Architecture, arXiv 1512.00567, 7.
    """

    needs_target: ClassVar[bool] = False

    def __init__(self, settings: CrossEntropySettings | None = None) -> None:
        super().__init__()
        self.smoothing = settings.smoothing if settings else 0.0

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the negative log-probability of each label, smoothed."""
        own_N = rows.cross_entropy_N
        if not self.smoothing:
            return {"loss": own_N}
        share = -1.0 / rows.drafter_logits_NV.shape[-1]
        fixed_NV = rows.fixed_log_q_NV
        even_N = rows.with_slope(-fixed_NV.mean(dim=-1), lambda: torch.full_like(fixed_NV, share))
        return {"loss": (1 - self.smoothing) * own_N + self.smoothing * even_N}
