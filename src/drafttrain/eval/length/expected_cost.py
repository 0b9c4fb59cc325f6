"""Draft another token while its expected yield is worth its time, by an acceptance head and measured costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Verdict
from drafttrain.core.reduce import Rate
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.recalibrated import ACCEPTANCE_HEAD, CALIBRATION_HELP
from drafttrain.eval.survival import Survival


@dataclass
class ExpectedCostSettings(LengthSettings):
    """Draft the number of tokens that maximizes the expected tokens per second."""

    draft_cost: float | None = setting(
        None,
        help="Cost of one draft token, in any unit: the time of a round without the verifying call, divided by its draft "
        "tokens. null: both costs are measured at the start.",
        gt=0,
    )
    target_cost: float | None = setting(None, help="Cost of one verifying call, in the same unit.", gt=0)
    max_tokens: int = setting(16, help="Draft tokens per round at most.", ge=1)
    head: str | None = setting(None, help="Folder of an acceptance head; null: the head that this recipe trains.")
    calibration: str | None = setting(None, help=CALIBRATION_HELP)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if (self.draft_cost is None) != (self.target_cost is None):
            return ["draft_cost: give both costs, or none: then both are measured"]
        return []


@length_policies.register("expected_cost", ExpectedCostSettings)
class ExpectedCost:
    """Stops where another draft token yields fewer expected tokens per second than decoding has yielded so far.

    Tokens per cost over many rounds are largest when every round stops where its marginal rate falls to that overall rate.
    The rate so far stands for it, and approaches it from below. One more step reads the newest draft token, whose
    acceptance is not predicted yet, and drafts another one. Both are assumed to be accepted as often as draft tokens after
    accepted ones were so far. The cost of a target call is assumed to be independent of its number of tokens, the cost of
    drafting to be proportional to it.

    Source: Dinkelbach 1967, On Nonlinear Fractional Programming, Management Science 13(7), for the form of the rule.
    """

    def __init__(self, settings: ExpectedCostSettings) -> None:
        self.settings = settings
        self.draft_cost, self.target_cost = settings.draft_cost, settings.target_cost
        self._accepted = Rate(1.0, 1.0)
        """Accepted share of the draft tokens after accepted ones; starts with one accepted token."""
        self._yield = Rate()
        """Tokens and cost of all rounds so far."""

    confidence: ClassVar[str] = ACCEPTANCE_HEAD

    @cached_property
    def survival(self) -> Survival:
        """The running product; the head is loaded at its first use."""
        return Survival.of_folder(self.settings.head, self.settings.calibration)

    def calibrate(self, generations: Sequence[Generation], events: Sequence[ForwardEvent] = ()) -> None:
        """Take the costs from measured rounds, unless the settings give them; forget the rounds so far.

        The cost of a draft is the time of a round without the verifying call: the drafter's calls, the target's first
        blocks where it drafts with them, drawing tokens, this policy, and updating the drafter's cache.
        """
        self._yield = Rate()
        if self.settings.draft_cost is None:
            rounds = [one for generation in generations for one in generation.rounds]
            drafted = sum(one.num_draft_tokens for one in rounds)
            if drafted:
                self.draft_cost = sum(generation.draft_seconds for generation in generations) / drafted
                self.target_cost = sum(generation.verify_seconds for generation in generations) / len(rounds)

    def noted(self, step: DraftStep) -> tuple[int, float] | None:
        """Return (depth, the head's prediction) of the newest token."""
        return self.survival.noted(step)

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens, states=True)

    def more(self, step: DraftStep) -> bool | More:
        alive = self.survival.after(step)
        if self.draft_cost is None or self.target_cost is None:
            return True  # not measured yet: full drafts are needed to measure both costs
        gain = alive * self._accepted.value**2
        return True if gain / self.draft_cost >= self.rate else More.LAST

    @property
    def rate(self) -> float:
        """Tokens per cost so far; before the first round, the rate of decoding without drafts."""
        assert self.target_cost is not None
        return self._yield.value if self._yield.count else 1 / self.target_cost

    def observe(self, verdict: Verdict) -> None:
        self._accepted.add(verdict.num_accepted, min(verdict.num_accepted + 1, verdict.num_draft_tokens))
        if self.draft_cost is not None and self.target_cost is not None:
            cost = self.target_cost + self.draft_cost * verdict.num_draft_tokens
            self._yield.add(len(verdict.tokens), cost)
