"""Stop drafting where the drafter itself predicts that its next token is rejected."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.recalibrated import CALIBRATION_HELP, CONFIDENCE_HEAD, Recalibration


@dataclass
class PredictedAcceptanceSettings(LengthSettings):
    """Draft another token while its acceptance, as a confidence head predicts it, is likely enough."""

    threshold: float = setting(
        0.4, help="Stop at the first token whose predicted chance of acceptance is below this.", ge=0, le=1
    )
    of: Literal["token", "prefix"] = setting(
        "token",
        help="token: the chance of the next token alone; prefix: the chance that it and all tokens before it pass.",
    )
    min_tokens: int = setting(1, help="Draft tokens per round at least.", ge=0)
    max_tokens: int = setting(16, help="Draft tokens per round at most.", ge=1)
    calibration: str | None = setting(None, help=CALIBRATION_HELP)
    reads_confidence: ClassVar[bool] = True

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.min_tokens > self.max_tokens:
            return [f"min_tokens: must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"]
        return []


@length_policies.register("predicted_acceptance", PredictedAcceptanceSettings)
class PredictedAcceptance:
    """Lossless: a prediction is made from the tokens before the one that it is about, so the cut never depends on that token.

    Source: DSpark, DeepSeek-AI 2026, DeepSpec repository, DSpark_paper.pdf.
    """

    confidence: ClassVar[str] = CONFIDENCE_HEAD

    def __init__(self, settings: PredictedAcceptanceSettings | None = None) -> None:
        self.settings = settings or PredictedAcceptanceSettings()
        self._recalibration = Recalibration(self.settings.calibration, of=self.confidence)
        self._passed: dict[int, float] = {}
        """By sequence, the predicted chance that all tokens drafted so far are accepted."""

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens)

    def more(self, step: DraftStep) -> bool:
        (chance,) = self._recalibration.each(chances_of([predicted(step)]))
        if self.settings.of == "prefix":
            chance *= 1.0 if step.depth == 1 else self._passed[step.sequence]
            self._passed[step.sequence] = chance
        return step.depth <= self.settings.min_tokens or chance >= self.settings.threshold

    def noted(self, step: DraftStep) -> tuple[int, float]:
        """Return (depth, the predicted chance) of the next token."""
        (chance,) = chances_of([predicted(step)])
        return step.depth, chance

    def observe(self, verdict: Verdict) -> None:
        pass


def predicted(step: DraftStep) -> Tensor:
    """Return the logit of the predicted acceptance of the next draft token.

    Raises:
        CheckpointError: The drafter predicts none.
    """
    if step.confidence is None:
        raise CheckpointError("eval.length: this policy needs a drafter with a confidence head, and this one has none")
    return step.confidence


def chances_of(scores: Sequence[Tensor]) -> list[float]:
    """Return the chances with these logits. The device is read once."""
    chances: list[float] = torch.stack(list(scores)).float().sigmoid().tolist() if scores else []
    return chances
