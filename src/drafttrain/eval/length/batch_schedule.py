"""Verify the draft tokens that pay, over all sequences of a batch together, by the drafter's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, ClassVar

from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.length.predicted_acceptance import chances_of, predicted
from drafttrain.eval.recalibrated import CALIBRATION_HELP, CONFIDENCE_HEAD, Recalibration

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class BatchScheduleSettings(LengthSettings):
    """Draft in full; verify the likeliest draft tokens of the whole batch, as long as that yields more tokens per second."""

    token_cost: float = setting(
        0.02,
        help="Time that one token adds to a round, divided by the time of a round that does not depend on its tokens. It is small "
        "where reading the weights takes the time, and grows with the load. The default is no measurement.",
        ge=0,
    )
    batch_tokens: int | None = setting(
        None,
        help="Tokens of a verifying call at most, with the last committed token of each sequence; null: no limit.",
        ge=1,
    )
    max_tokens: int = setting(16, help="Draft tokens per round and sequence at most.", ge=1)
    calibration: str | None = setting(None, help=CALIBRATION_HELP)
    reads_confidence: ClassVar[bool] = True


@length_policies.register("batch_schedule", BatchScheduleSettings)
class BatchSchedule:
    """Lossless: whether a draft token is verified depends on tokens before it and on other sequences.

    The expected tokens of a round are one for each sequence, and for each verified draft token the chance that it and all tokens
    before it are accepted.

    Source: DSpark, DeepSeek-AI 2026, DeepSpec repository, DSpark_paper.pdf.
    """

    confidence: ClassVar[str] = CONFIDENCE_HEAD

    def __init__(self, settings: BatchScheduleSettings | None = None) -> None:
        self.settings = settings or BatchScheduleSettings()
        self._recalibration = Recalibration(self.settings.calibration, of=self.confidence)
        self._predicted: dict[int, list[Tensor]] = {}
        """By sequence, the logits of the predicted acceptance of the draft tokens of this round."""

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens)

    def more(self, step: DraftStep) -> bool:
        self._predicted.setdefault(step.sequence, []).append(predicted(step))
        return True

    def noted(self, step: DraftStep) -> tuple[int, float]:
        """Return (depth, the predicted chance) of the next token."""
        (chance,) = chances_of([predicted(step)])
        return step.depth, chance

    def schedule(self, num_sequences: int) -> list[int]:
        """Return how many draft tokens of each sequence are verified. The device is read once for all."""
        drafted, self._predicted = self._predicted, {}
        scores_of_all = [score for scores in drafted.values() for score in scores]
        chances = iter(self._recalibration.each(chances_of(scores_of_all)))
        survival = {number: [next(chances) for _ in scores] for number, scores in drafted.items()}
        survivals = [list(accumulate(survival.get(number, ()), mul)) for number in range(num_sequences)]
        return self.lengths(survivals)

    def lengths(self, survivals: Sequence[Sequence[float]]) -> list[int]:
        """Return how many draft tokens of each sequence are verified, of those with these chances to survive."""
        return scheduled(survivals, self.cost, most=self.settings.batch_tokens)

    def cost(self, num_tokens: int) -> float:
        """Return the time of a round whose verifying call reads so many tokens, in times of a round without tokens."""
        return 1 + self.settings.token_cost * num_tokens

    def observe(self, verdict: Verdict) -> None:
        pass


def scheduled(
    survivals: Sequence[Sequence[float]], cost: Callable[[int], float], *, most: int | None = None
) -> list[int]:
    """Return how many draft tokens of each sequence are verified.

    Draft tokens are added in the order of their chance to survive, and the first one that does not raise the expected tokens per
    time is the end. To look behind it, where a cost that rises in steps may pay again, would change the output: the chance of a
    later token is predicted from the earlier one, which would then be verified only if it leads to a likely one.

    Args:
        survivals: By sequence and draft token, the chance that it and all before it are accepted; not rising.
        cost: The time of a round by the tokens of its verifying call.
        most: Tokens of a verifying call, with one committed token for each sequence; None: any number.
    """
    lengths = [0] * len(survivals)
    expected, num_tokens = float(len(survivals)), len(survivals)
    # Equal chances of one sequence are taken in the order of its tokens.
    order = sorted(
        (-chance, depth, number) for number, chances in enumerate(survivals) for depth, chance in enumerate(chances, 1)
    )
    for loss, depth, number in order:
        if most is not None and num_tokens >= most:
            break
        if (expected - loss) / cost(num_tokens + 1) <= expected / cost(num_tokens):
            break
        expected, num_tokens, lengths[number] = expected - loss, num_tokens + 1, depth
    return lengths
