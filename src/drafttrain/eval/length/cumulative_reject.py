"""Stop drafting when an acceptance head predicts that some draft token will be rejected."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.recalibrated import ACCEPTANCE_HEAD, CALIBRATION_HELP
from drafttrain.eval.survival import Survival


@dataclass
class CumulativeRejectSettings(LengthSettings):
    """Draft while 1 - prod a_i is at most a threshold; a_i is the predicted acceptance of draft token i."""

    threshold: float = setting(
        0.5, help="Drafting continues while the probability of a rejection is at most this; 1: always, below 0: never."
    )
    min_tokens: int = setting(1, help="Draft tokens per round at least.", ge=1)
    max_tokens: int = setting(16, help="Draft tokens per round at most.", ge=1)
    head: str | None = setting(None, help="Folder of an acceptance head; null: the head that this recipe trains.")
    calibration: str | None = setting(None, help=CALIBRATION_HELP)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.min_tokens > self.max_tokens:
            return [f"min_tokens: must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"]
        return []


@length_policies.register("cumulative_reject", CumulativeRejectSettings)
class CumulativeReject:
    """Lossless: every token that the decision depends on is in the draft already, and stays in it.

    Source: Huang et al. 2024, SpecDec++, arXiv 2405.19715, 3.1: the optimal rule has this form.
    """

    def __init__(self, settings: CumulativeRejectSettings) -> None:
        self.settings = settings

    confidence: ClassVar[str] = ACCEPTANCE_HEAD

    @cached_property
    def survival(self) -> Survival:
        """The running product; the head is loaded at its first use."""
        return Survival.of_folder(self.settings.head, self.settings.calibration)

    def noted(self, step: DraftStep) -> tuple[int, float] | None:
        """Return (depth, the head's prediction) of the newest token."""
        return self.survival.noted(step)

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens, states=True)

    def more(self, step: DraftStep) -> bool | More:
        alive = self.survival.after(step)
        if step.depth < self.settings.min_tokens or 1 - alive <= self.settings.threshold:
            return True
        return More.LAST

    def observe(self, verdict: Verdict) -> None:
        pass
