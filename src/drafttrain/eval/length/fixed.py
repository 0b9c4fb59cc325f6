"""The same number of draft tokens in every round."""

from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import length_policies


@dataclass
class FixedLengthSettings:
    """Draft the same number of tokens in every round."""

    num_draft_tokens: int = setting(5, help="Draft tokens per round.", ge=1)


@length_policies.register("fixed", FixedLengthSettings)
class FixedLength:
    """A fixed chain length."""

    def __init__(self, settings: FixedLengthSettings | None = None) -> None:
        self.settings = settings or FixedLengthSettings()

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.num_draft_tokens, depth=self.settings.num_draft_tokens)

    def more(self, step: DraftStep) -> bool:
        return True

    def observe(self, verdict: Verdict) -> None:
        pass
