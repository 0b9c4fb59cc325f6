"""The settings of Hidden Transfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drafttrain.core.errors import CheckpointError
from drafttrain.core.settings import setting


@dataclass
class HiddenTransferSettings:
    """Linear maps inside the frozen target: pseudo states of the next tokens go through its remaining blocks (Hidden Transfer)."""

    num_steps: int = setting(3, help="Draft tokens of a round, each with a map of its own.", ge=1)
    layers: list[int] | None = setting(
        None,
        help="For each draft token the block whose input state its map reads, of 1..layers, not falling; the number of layers: "
        "the state after the last block. null: the middle block, then one block later for each.",
        ge=1,
    )
    train_steps: Literal["in_turn", "together"] = setting(
        "in_turn",
        help="in_turn: the maps are trained one after another, each for an equal part of train.max_steps, as in the paper; "
        "together: all in every step.",
    )
    draft_in: Literal["verifying_call", "own_pass"] = setting(
        "verifying_call",
        help="verifying_call: every node of a draft has pseudo states in the call that verifies it, as in the paper; own_pass: the last "
        "accepted token has them in a pass of its own.",
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled",
        help="At temperature > 0: a draw from each draft token's distribution, or its argmax (then nodes are FIXED).",
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.layers is None:
            return []
        problems = []
        if len(self.layers) != self.num_steps:
            problems.append(f"layers: one for each of num_steps {self.num_steps} draft tokens, got {len(self.layers)}")
        if self.layers != sorted(self.layers):
            problems.append(f"layers: must not fall from one draft token to the next, got {self.layers}")
        return problems


def layers_of(given: list[int] | None, *, num_steps: int, num_blocks: int) -> list[int]:
    """Return the block whose input state each map reads.

    Raises:
        CheckpointError: The target has fewer blocks.
    """
    if given is None:
        return [min(num_blocks // 2 + step, num_blocks) or 1 for step in range(num_steps)]
    if max(given) > num_blocks:
        raise CheckpointError(
            f"drafter.layers must be of 1..{num_blocks} for this target ({num_blocks} layers), got {given}"
        )
    return list(given)
