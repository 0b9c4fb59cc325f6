"""Fallback (BiLD): the drafter continues as long as it is confident, and passes to the target where it is not.

V = vocabulary
"""

from dataclasses import dataclass

from drafttrain.core.proposals import Budget, Context, DraftStep
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, WholeBudget, length_policies


@dataclass
class FallbackSettings(LengthSettings):
    """Draft while the drafter is confident; the target writes the first token of which it is not (BiLD)."""

    threshold: float = setting(
        0.6,
        help="Fall back where the largest probability of the drafter's next distribution is below this. 0: never; above 1: always, so "
        "that the target writes every token.",
        ge=0,
    )
    max_tokens: int = setting(10, help="Draft tokens per round at most.", ge=1)


@length_policies.register("fallback", FallbackSettings)
class Fallback(WholeBudget):
    """Lossless by itself: it decides by a distribution before a token is drawn from it. Its rule `rollback` is LOSSY.

    Source: Kim et al. 2023, Speculative Decoding with Big Little Decoder, arXiv 2302.07863, 3.3.
    """

    def __init__(self, settings: FallbackSettings | None = None) -> None:
        self.settings = settings or FallbackSettings()

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens)

    def more(self, step: DraftStep) -> bool:
        return float(step.q_row_V.max()) >= self.settings.threshold
