"""The probability that all draft tokens of a round will be accepted, predicted by an acceptance head."""

from __future__ import annotations

from pathlib import Path

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import DraftStep
from drafttrain.eval.recalibrated import ACCEPTANCE_HEAD, Recalibration
from drafttrain.heads import TokenHead
from drafttrain.heads.folder import load_head


class Survival:
    """Multiplies the head's predictions along the draft of each sequence.

    A token counts as soon as its hidden state exists, one step after it was drafted. It is in the tree by then, so decisions
    that depend on its prediction leave the output lossless.
    """

    def __init__(self, head: TokenHead, calibration: str | None = None) -> None:
        self.head = head
        self._recalibration = Recalibration(calibration, of=ACCEPTANCE_HEAD)
        self._alive: dict[int, float] = {}

    @classmethod
    def of_folder(cls, folder: str | None, calibration: str | None = None) -> Survival:
        """Load the head of a folder, whose predictions a file calibrates if one is given."""
        if folder is None:
            raise CheckpointError("eval.length.head: null means the head that the recipe trains. Give a folder here.")
        return cls(load_head(Path(folder), kind="acceptance").head, calibration)

    def after(self, step: DraftStep) -> float:
        """Return the probability that all tokens in the tree are accepted; 1 at depth 1, where nothing is drafted yet."""
        noted = self.noted(step)
        alive = 1.0 if noted is None else self._alive[step.sequence] * self._recalibration.one(noted[1])
        self._alive[step.sequence] = alive
        return alive

    def noted(self, step: DraftStep) -> tuple[int, float] | None:
        """Return (depth, the head's prediction) of the newest token; None at depth 1, where nothing is drafted yet."""
        return None if step.depth == 1 else (step.depth - 1, self._prediction(step))

    @torch.no_grad()
    def _prediction(self, step: DraftStep) -> float:
        if step.hidden_D is None:
            raise CheckpointError(
                "eval.length: this drafter has no hidden state of its draft tokens for the acceptance head"
            )
        if step.hidden_D.shape[-1] != self.head.hidden_size:
            raise CheckpointError(
                f"eval.length.head: made for a drafter of width {self.head.hidden_size}, this drafter has {step.hidden_D.shape[-1]}"
            )
        self.head.to(step.hidden_D.device)
        return float(self.head.probability(step.hidden_D[None])[0])
