"""The same number of draft tokens in every round."""

from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies


@dataclass
class FixedLengthSettings(LengthSettings):
    """Draft the same number of tokens in every round."""

    num_draft_tokens: int = setting(5, help="Draft tokens per round.", ge=1)

    @property
    def chain_length(self) -> int:
        """The length of every round."""
        return self.num_draft_tokens


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
