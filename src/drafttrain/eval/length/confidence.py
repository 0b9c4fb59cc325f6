"""Stop drafting where the drafter is unsure of the next token.

V = vocabulary
"""

from dataclasses import dataclass
from typing import ClassVar

from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.recalibrated import CALIBRATION_HELP, LARGEST_PROBABILITY, Recalibration


@dataclass
class ConfidenceSettings(LengthSettings):
    """Draft another token while the drafter's next distribution has a likely one."""

    threshold: float = setting(
        0.4,
        help="Stop where the largest probability of the drafter's next distribution (calibrated: its chance) is below this.",
        ge=0,
        le=1,
    )
    min_tokens: int = setting(1, help="Draft tokens per round at least.", ge=0)
    max_tokens: int = setting(12, help="Draft tokens per round at most.", ge=1)
    calibration: str | None = setting(None, help=CALIBRATION_HELP)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.min_tokens > self.max_tokens:
            return [f"min_tokens: must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"]
        return []


@length_policies.register("confidence", ConfidenceSettings)
class Confidence:
    """Decides by the drafter's distribution before a token is drawn from it, so the output stays lossless."""

    confidence: ClassVar[str] = LARGEST_PROBABILITY

    def __init__(self, settings: ConfidenceSettings | None = None) -> None:
        self.settings = settings or ConfidenceSettings()
        self._recalibration = Recalibration(self.settings.calibration, of=self.confidence)

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens)

    def more(self, step: DraftStep) -> bool:
        if step.depth <= self.settings.min_tokens:
            return True
        return self._recalibration.one(_largest(step)) >= self.settings.threshold

    def noted(self, step: DraftStep) -> tuple[int, float]:
        """Return (depth, the largest probability) of the next token."""
        return step.depth, _largest(step)

    def observe(self, verdict: Verdict) -> None:
        pass


def _largest(step: DraftStep) -> float:
    return float(step.q_row_V.max())
