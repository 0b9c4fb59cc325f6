"""A length policy that notes how confident each draft token was, and whether it was accepted."""

from __future__ import annotations

from drafttrain.core.proposals import Budget, Context, DraftStep, Verdict
from drafttrain.eval.recalibrated import HasConfidence


class NotedConfidence:
    """Drafts as far as another policy may, and never stops before: a policy that stops would hide the tokens that it expects to fail.

    Only tokens whose predecessors were all accepted are tested. So a pair is about the chance of a token given that it is reached,
    which is what policies multiply.

    Args:
        policy: Its confidence is noted, as it is.
    """

    def __init__(self, policy: HasConfidence) -> None:
        self._policy = policy
        self._noted: dict[tuple[int, int], float] = {}
        """By sequence and depth, of this round."""
        self._num_observed = 0
        self.pairs: list[tuple[float, bool]] = []
        """(confidence, accepted) of every tested draft token."""

    def budget(self, context: Context) -> Budget:
        # All budgets of a round are asked for before its first token is drafted, and its verdicts come in the same order.
        self._noted.clear()
        self._num_observed = 0
        return self._policy.budget(context)

    def more(self, step: DraftStep) -> bool:
        if (noted := self._policy.noted(step)) is not None:
            depth, confidence = noted
            self._noted[step.sequence, depth] = confidence
        return True

    def observe(self, verdict: Verdict) -> None:
        sequence, self._num_observed = self._num_observed, self._num_observed + 1
        for depth, (_, accepted) in enumerate(verdict.tested, start=1):
            if (confidence := self._noted.get((sequence, depth))) is not None:
                self.pairs.append((confidence, accepted))
