"""LayerSkip's schedules: which exits a step trains, with which weights, and how often each block is dropped.

Exits are numbered by the blocks before them, 1..L; exit L is the target's own end. Blocks are numbered 0..L-1.

L = blocks, T = steps of the training
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from drafttrain.core.settings import setting


@dataclass
class CurriculumSettings:
    """Losses at exits, and dropped blocks."""

    exit_scale: float = setting(1.0, help="Weight of early exits against that of the last block.", ge=0)
    curriculum: Literal["all", "rotational", "gradual"] = setting(
        "rotational",
        help="Exits that a step trains beside the last one. all: every exit; rotational: every `rotation`-th, others in each step; "
        "gradual: one more, from the last on, in each of 2 L parts of the training, so that all are trained from its middle on.",
    )
    rotation: int = setting(4, help="Steps until curriculum rotational trains the same exits again.", ge=1)
    layer_dropout: float = setting(
        0.1,
        help="Share of the documents that skip the last block in a step. It rises from 0 for the first block, exponentially. The choice "
        "depends only on step and document.",
        ge=0,
        le=1,
    )
    dropout_curriculum: Literal["constant", "exponential"] = setting(
        "constant", help="exponential: the share rises from 0 to layer_dropout during the training."
    )

    def trained(self, num_blocks: int, *, step: int, num_steps: int) -> list[int]:
        """Return the exits whose loss counts in a step, ascending. The last one always does.

        Args:
            num_steps: T; 0: not known, then all exits are trained by curriculum gradual.
        """
        inner = range(1, num_blocks)
        if self.curriculum == "rotational":
            chosen = [one for one in inner if (one - 1 - step) % self.rotation == 0]
        elif self.curriculum == "gradual" and num_steps:
            chosen = [one for one in inner if num_blocks - one <= 2 * num_blocks * step // num_steps]
        else:
            chosen = list(inner)
        return [*chosen, num_blocks]

    def weights(self, exits: Sequence[int], num_blocks: int) -> dict[int, float]:
        """Return the weight of the loss of each exit: with the numbers of blocks so far added up, and divided by their sum.

        Source: Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710, equations 4 and 5.
        """
        whole = num_blocks - 1 + self.exit_scale * (num_blocks - 1) * (num_blocks - 2) / 2
        found = {one: self.exit_scale * one * (one - 1) / 2 if one < num_blocks else whole for one in exits}
        total = sum(found.values())
        return {one: value / total for one, value in found.items()}

    def drop_rates(self, num_blocks: int, *, step: int, num_steps: int) -> list[float]:
        """Return the chance of each block that a document skips it in a step.

        Args:
            num_steps: T; 0: not known, then the rates do not rise.

        Source: Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710, equation 1.
        """
        rising = self.dropout_curriculum == "exponential" and num_steps > 1
        largest = self.layer_dropout * (2 ** (step / (num_steps - 1)) - 1 if rising else 1.0)
        return [largest * (2 ** (block / (num_blocks - 1)) - 1) for block in range(num_blocks)]
