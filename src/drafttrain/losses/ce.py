"""Cross-entropy with the token that the data has: hard labels, no target needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.losses import Loss, losses


@dataclass
class CrossEntropySettings:
    """Cross-entropy with the token in the data; needs no target."""


@losses.register("ce", CrossEntropySettings)
class CrossEntropy(Loss):
    """-log q(label), nats."""

    needs_target: ClassVar[bool] = False

    def __init__(self, settings: CrossEntropySettings | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the negative log-probability of each label."""
        return {"loss": rows.cross_entropy_N}
