"""D-PACE: every depth weighs as much as the expected number of accepted tokens that depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss, losses
from drafttrain.losses.blocks import Blocks
from drafttrain.losses.ce import CrossEntropySettings

CHANCE = "chance"


@dataclass
class DPaceSettings:
    """A loss of single rows, weighed by the expected number of draft tokens that are accepted from its depth on."""

    loss: Any = setting(
        CrossEntropySettings(),
        help="The loss that is weighed, by kind: one whose rows do not depend on each other.",
        registry=losses,
    )
    chance: Literal["label", "acceptance"] = setting(
        "label",
        help="Chance that a depth is accepted. label: the drafter's probability of the data's token, as published; "
        "acceptance: the acceptance rate, for a loss that compares with the target.",
    )
    smoothing: float = setting(
        0.5, help="a: a chance c counts as (1 - a) c + a. 0: exact; 1: weights K, K-1, ..., 1.", ge=0, le=1
    )
    block_length: int = setting(5, help="Draft tokens of a block, for a drafter of depth 1.", ge=1)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        loss: Loss = losses.build(self.loss)
        if not loss.pointwise:
            return [f"loss: its rows must not depend on each other, got {self.loss.kind}"]
        if self.chance == "acceptance" and not loss.needs_target:
            return [f"chance: acceptance needs a loss that compares with the target, got {self.loss.kind}"]
        return []


@losses.register("d_pace", DPaceSettings)
class DPace(Loss):
    """w_j loss_j, w_j = sg[ sum_{m=j..K} prod_{i<=m} c~_i ], c~ = (1 - a) c + a, for depth j of a block of K.

    With a = 0 the sum over a block has the gradient of minus the expected accepted length, sum_m prod_{i<=m} c_i, if the loss is
    -log c: `ce` for the label's probability, `neg_log_acceptance` for the acceptance rate. With any other loss the weights are a
    heuristic: they say how much depends on a depth, whatever the unit of the loss.

    A block counts from its first depth that can be learned. From the next hole on, a depth that is not trained or cannot be
    learned, and after a label that the drafter's vocabulary lacks, c~ is 0: no draft is accepted behind it.

    The weights are not normalised: a division by their sum would undo their growth with the drafter's acceptance. The step
    divides by its trained positions, as for every loss.

    Source: D-PACE, arXiv 2605.18810.
    """

    def __init__(self, settings: DPaceSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or DPaceSettings()
        self.inner: Loss = losses.build(self.settings.loss)

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        """Whether the weighed loss does."""
        return self.inner.needs_target

    @property
    def runs_without_target(self) -> bool:
        """Whether the weighed loss does, and the chances too."""
        return self.settings.chance != "acceptance" and self.inner.runs_without_target

    def reads_target(self, step: int) -> bool:
        """Return whether the weighed loss or the chances read it."""
        return self.settings.chance == "acceptance" or self.inner.reads_target(step)

    @property
    def block_length(self) -> int:
        """Draft tokens of a block."""
        return self.settings.block_length

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the values of the weighed loss, and the chance of each row."""
        return {**self.inner.per_row(rows), CHANCE: self._chance(rows)}

    def _chance(self, rows: LossRows) -> Tensor:
        if self.settings.chance == "acceptance":
            return rows.acceptance_N.detach()
        # -1 marks a label that the vocabulary lacks: no smoothing may make it likely.
        return torch.where(rows.tokens_N >= 0, (-rows.cross_entropy_N.detach()).exp(), -1.0)

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return the weighed loss of each row."""
        own = {name: value for name, value in values.items() if name != CHANCE}
        return self._weights(values[CHANCE].detach(), index) * self.inner.combine(own, index)

    def _weights(self, chance_N: Tensor, index: RowIndex) -> Tensor:
        share = 1 - self.settings.smoothing
        smooth_N = (share * chance_N + self.settings.smoothing) * (chance_N >= 0)
        blocks = Blocks.of(index)
        reached_BK = blocks.table(smooth_N).cumprod(dim=1)
        return blocks.rows(reached_BK.flip(1).cumsum(dim=1).flip(1))

    def end_of_step(self) -> None:
        """End the step of the weighed loss."""
        self.inner.end_of_step()
