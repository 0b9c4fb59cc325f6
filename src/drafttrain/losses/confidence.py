"""Trains a drafter to predict which of its tokens are accepted."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from drafttrain.core.errors import CheckpointError
from drafttrain.core.loss_rows import LossRows
from drafttrain.losses import Loss, losses


@dataclass
class ConfidenceSettings:
    """Cross-entropy of the predicted acceptance with the acceptance rate, for a drafter that predicts it; a term of a `sum`."""


@losses.register("confidence", ConfidenceSettings)
class Confidence(Loss):
    """-a log c - (1 - a) log(1 - c), nats: c is the predicted chance of acceptance, a = sg[sum_x min(p, q)] the acceptance rate.

    For a given a it is least at c = a, where it is the entropy of a, not 0.

    Source: DSpark, DeepSeek-AI 2026, DeepSpec repository, DSpark_paper.pdf.
    """

    def __init__(self, settings: ConfidenceSettings | None = None) -> None:
        super().__init__()

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the loss of each row.

        Raises:
            CheckpointError: The drafter predicts no acceptance.
        """
        if rows.confidence_N is None:
            raise CheckpointError(
                "loss: confidence trains a drafter's prediction of its acceptance, and this drafter has none"
            )
        rate_N = rows.acceptance_N.detach()
        predicted_N = rows.confidence_N.to(rate_N.dtype)
        # Rounding may lift a rate above 1.
        return {"loss": binary_cross_entropy_with_logits(predicted_N, rate_N.clamp(0, 1), reduction="none")}
