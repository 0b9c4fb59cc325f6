"""SWIFT: the target drafts without some of its sublayers, which are searched on the text that it has just written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Context, Verdict
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetOutput
from drafttrain.drafters.layer_skip.module import LayerSkipDrafter
from drafttrain.drafters.layer_skip.proposer import LayerSkipProposer
from drafttrain.drafters.layer_skip.search import Search, SearchSettings, as_chosen, as_skipped, spread
from drafttrain.drafters.layer_skip.windows import Window, matched
from drafttrain.eval.proposers import Surroundings, proposers
from drafttrain.target_model import Target
from drafttrain.target_model.sublayers import Skipped, Sublayers


@dataclass
class SwiftSettings(SearchSettings):
    """The target without sublayers that are searched while it writes."""

    nodes_come_first: ClassVar[bool] = True
    in_target: ClassVar[bool] = True

    start: Literal["even", "drafter"] = setting(
        "even",
        help="First set: sublayers at equal distances, or that of the drafter that is evaluated, of kind layer_skip.",
    )
    max_steps: int = setting(1000, help="Sets that are scored at most, one a round.", ge=1)
    warm: bool = setting(
        False, help="Continue with set and search of the prompts before; else every prompt starts again."
    )

    @property
    def reads_drafter(self) -> bool:
        """It starts with the set of the drafter that is evaluated."""
        return self.start == "drafter"


@proposers.register("swift", SwiftSettings)
class Swift(LayerSkipProposer):
    """Scores one set after each round, on the first `window` new tokens of each text, and drafts with the best set so far.

    The set depends on committed text alone, so the output distribution stays the target's. Sequences that are decoded together
    share a set. Window and prompt are in the target's cache: scoring reads the prompt's keys and values there.

    Source: Xia et al. 2024, SWIFT, arXiv 2410.06916.
    """

    def __init__(self, settings: SwiftSettings, target: Target, first: Skipped) -> None:
        super().__init__(target, first)
        self.settings = settings
        self._num_tokens = target.num_tokens
        self._first = first
        self.forget()

    @classmethod
    def create(cls, settings: SwiftSettings, surroundings: Surroundings) -> Swift:
        """Return the proposer for this target."""
        if not settings.reads_drafter:
            num_blocks = Sublayers(surroundings.target.model).num_blocks
            return cls(settings, surroundings.target, as_skipped(spread(num_blocks, settings.ratio)))
        drafter = surroundings.drafter
        if not isinstance(drafter, LayerSkipDrafter):
            raise CheckpointError(
                f"eval.beside: swift with start: drafter needs a drafter of kind layer_skip, got {drafter.kind if drafter else None}"
            )
        return cls(settings, surroundings.target, drafter.skipped)

    @property
    def skipped(self) -> Skipped:
        """The set that it drafts with now."""
        return self._beside.skipped

    def forget(self) -> None:
        """Start again with the first set."""
        size = 2 * (self._beside.sublayers.num_blocks - 2)
        self._search = Search(size, as_chosen(self._first), self.settings, seed=0)
        self._beside.skipped = self._first

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts."""
        super().begin(contexts, seen)
        if not self.settings.warm:
            self.forget()

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Score one more set."""
        super().observe(verdicts, seen)
        windows = [self._window(context) for context in self._contexts]
        num_labels = sum(len(window.labels) for window in windows)
        if not num_labels or self._search.ended or self._search.num_steps >= self.settings.max_steps:
            return
        chosen, lm = self._search.propose(), self._beside.lm
        found = matched(lm, windows, self._beside.sublayers, as_skipped(chosen), num_tokens=self._num_tokens)
        self._search.observe(chosen, found / num_labels)
        self._beside.skipped = as_skipped(self._search.best)

    def _window(self, context: Context) -> Window:
        """Return the first new tokens of a text; no tokens as long as there are too few."""
        begin = context.num_prompt_tokens - 1
        end = begin + self.settings.window
        tokens = context.tokens[begin : end + 1] if end < len(context.tokens) else []
        return Window(context.tokens[:begin], tokens[:-1], list(tokens[1:]))
