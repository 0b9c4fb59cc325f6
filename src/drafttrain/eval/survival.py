"""The chance that all that was drafted in a round will be kept, by an acceptance head."""

from __future__ import annotations

from pathlib import Path

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import DraftStep
from drafttrain.heads import TokenHead
from drafttrain.heads.folder import load_head


class Survival:
    """Multiplies the head's chances along each sequence's draft.

    A token counts from the step on that has its hidden state: the step after it was drafted. It is in the tree by then, so
    whatever is decided by its chance leaves the output lossless.
    """

    def __init__(self, head: TokenHead) -> None:
        self.head = head
        self._alive: dict[int, float] = {}

    @classmethod
    def of_folder(cls, folder: str | None) -> Survival:
        """Read the head of a folder."""
        if folder is None:
            raise CheckpointError("eval.length.head: null means the head of the run's own recipe; name a folder here")
        return cls(load_head(Path(folder), kind="acceptance").head)

    def after(self, step: DraftStep) -> float:
        """Return the chance that all tokens in the tree are kept; at depth 1 nothing is drafted, and it is 1."""
        alive = 1.0 if step.depth == 1 else self._alive[step.sequence] * self._chance(step)
        self._alive[step.sequence] = alive
        return alive

    @torch.no_grad()
    def _chance(self, step: DraftStep) -> float:
        if step.hidden_D is None:
            raise CheckpointError("eval.length: this drafter hands out no hidden state of its draft tokens")
        if step.hidden_D.shape[-1] != self.head.hidden_size:
            raise CheckpointError(
                f"eval.length.head: made for a drafter of width {self.head.hidden_size}, this one has {step.hidden_D.shape[-1]}"
            )
        self.head.to(step.hidden_D.device)
        return float(self.head.probability(step.hidden_D[None])[0])
