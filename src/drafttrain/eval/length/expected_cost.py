"""Draft another token while it is expected to yield more than its time is worth, by an acceptance head and measured costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from drafttrain.core.generations import Generation
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Verdict
from drafttrain.core.reduce import Rate
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, length_policies
from drafttrain.eval.survival import Survival


@dataclass
class ExpectedCostSettings(LengthSettings):
    """Draft the number of tokens that maximises expected tokens a second."""

    draft_cost: float | None = setting(
        None,
        help="Cost of a draft token: all of a round that is not the verifying call, by draft token, in any unit; null: both are "
        "measured at the start.",
        gt=0,
    )
    target_cost: float | None = setting(None, help="Cost of one verifying call, in the same unit.", gt=0)
    max_tokens: int = setting(16, help="Draft tokens a round at most.", ge=1)
    head: str | None = setting(None, help="Folder of an acceptance head; null: the one that this recipe trains.")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if (self.draft_cost is None) != (self.target_cost is None):
            return ["draft_cost: give both costs, or neither and both are measured"]
        return []


@length_policies.register("expected_cost", ExpectedCostSettings)
class ExpectedCost:
    """Stops where a further draft token yields fewer expected tokens a second than decoding has yielded so far.

    The rate of tokens a cost over many rounds is largest when every round stops where its marginal rate falls to that
    overall rate; the rate so far takes its place and approaches it from below. Drafting on reads the token drafted last,
    whose own chance is not known yet, and gives one more: each is taken to be kept as often as draft tokens were that stood
    behind kept ones. The cost of a target call is taken not to grow with the tokens in it, that of drafting to grow by the same with each token.

    Source: Dinkelbach 1967, On Nonlinear Fractional Programming, Management Science 13(7), for the form of the rule.
    """

    def __init__(self, settings: ExpectedCostSettings) -> None:
        self.settings = settings
        self.draft_cost, self.target_cost = settings.draft_cost, settings.target_cost
        self._kept = Rate(1.0, 1.0)
        """How often a draft token was kept of those behind kept ones; begins with one that was."""
        self._yield = Rate()
        """Tokens and cost of all rounds so far."""

    @cached_property
    def survival(self) -> Survival:
        """The running product; the head is read when it is first asked."""
        return Survival.of_folder(self.settings.head)

    def calibrate(self, generations: Sequence[Generation]) -> None:
        """Take the costs from measured rounds, unless the settings give them; forget the rounds so far.

        All of a round that is not the verifying call is the cost of its draft: the drafter's calls, the target's first blocks
        where it drafts with them, drawing tokens, asking this policy, and keeping the drafter's cache.
        """
        self._yield = Rate()
        if self.settings.draft_cost is None:
            rounds = [one for generation in generations for one in generation.rounds]
            drafted = sum(one.num_draft_tokens for one in rounds)
            if drafted:
                self.draft_cost = sum(generation.draft_seconds for generation in generations) / drafted
                self.target_cost = sum(generation.verify_seconds for generation in generations) / len(rounds)

    def budget(self, context: Context) -> Budget:
        return Budget(nodes=self.settings.max_tokens, depth=self.settings.max_tokens, states=True)

    def more(self, step: DraftStep) -> bool | More:
        alive = self.survival.after(step)
        if self.draft_cost is None or self.target_cost is None:
            return True  # not measured yet: whole drafts show what both cost
        gain = alive * self._kept.value**2
        return True if gain / self.draft_cost >= self.rate else More.LAST

    @property
    def rate(self) -> float:
        """Tokens a cost so far; before the first round, what decoding without drafts yields."""
        assert self.target_cost is not None
        return self._yield.value if self._yield.count else 1 / self.target_cost

    def observe(self, verdict: Verdict) -> None:
        self._kept.add(verdict.num_accepted, min(verdict.num_accepted + 1, verdict.num_draft_tokens))
        if self.draft_cost is not None and self.target_cost is not None:
            cost = self.target_cost + self.draft_cost * verdict.num_draft_tokens
            self._yield.add(len(verdict.tokens), cost)
