"""Stop drafting when a rejection somewhere in the draft has become likely, by an acceptance head."""

from dataclasses import dataclass
from functools import cached_property

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.survival import Survival


@dataclass
class CumulativeRejectSettings(LengthSettings):
    """Draft on while 1 - prod a_i is at most a threshold; a_i is the predicted acceptance of draft token i."""

    threshold: float = setting(
        0.5, help="Largest chance that something was refused at which drafting goes on; 1: always, below 0: never."
    )
    min_tokens: int = setting(1, help="Draft tokens a round at least.", ge=1)
    max_tokens: int = setting(16, help="Draft tokens a round at most.", ge=1)
    head: str | None = setting(None, help="Folder of an acceptance head; null: the one that this recipe trains.")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.min_tokens > self.max_tokens:
            return [f"min_tokens: must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"]
        return []


@length_policies.register("cumulative_reject", CumulativeRejectSettings)
class CumulativeReject:
    """Lossless: a token that makes the chance too large is in the draft already, and so is the one whose law is known by then.

    Source: Huang et al. 2024, SpecDec++, arXiv 2405.19715, 3.1: the optimal rule has this form.
    """

    def __init__(self, settings: CumulativeRejectSettings) -> None:
        self.settings = settings

    @cached_property
    def survival(self) -> Survival:
        """The running product; the head is read when it is first asked."""
        return Survival.of_folder(self.settings.head)

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens, states=True)

    def more(self, step: DraftStep) -> bool | More:
        alive = self.survival.after(step)
        if step.depth < self.settings.min_tokens or 1 - alive <= self.settings.threshold:
            return True
        return More.LAST

    def observe(self, verdict: Verdict) -> None:
        pass
