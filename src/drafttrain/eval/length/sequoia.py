"""Sequoia: the static tree that is best for the measured acceptance of first, second, ... children."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.core.proposals import Budget, Context, DrawMode, Verdict
from drafttrain.core.settings import setting
from drafttrain.eval.length import LengthSettings, WholeBudget, length_policies
from drafttrain.eval.length.best_tree import BestTrees, RankCounts
from drafttrain.eval.length.static_tree import Shape, StaticForm

MOST_TOKENS = 128
"""Nodes of a tree at most: the time to choose it grows with their number cubed."""


@dataclass
class SequoiaSettings(LengthSettings):
    """Draw the static tree with the most expected tokens, or with the most per second."""

    num_draft_tokens: int | None = setting(
        None,
        help="Nodes of the tree without its root; null: the number that yields most tokens per second on this machine, measured at "
        "the start.",
        ge=1,
        le=MOST_TOKENS,
    )
    max_tokens: int = setting(32, help="Nodes at most, where their number is measured.", ge=1, le=MOST_TOKENS)
    depth: int | None = setting(None, help="Levels of the tree at most; null: a chain of all nodes is possible.", ge=1)
    width: int = setting(8, help="Most children of a node.", ge=2)
    acceptance: list[float] | None = setting(
        None,
        help="By rank, the chance that a node's k-th child is accepted after those before it were rejected; null: measured at the start.",
        ge=0,
        le=1,
    )

    @property
    def nodes(self) -> int:
        """Nodes of the largest tree."""
        return self.num_draft_tokens or self.max_tokens

    @property
    def levels(self) -> int:
        """Levels of the deepest tree."""
        return min(self.depth or self.nodes, self.nodes)

    @property
    def most_children(self) -> int:
        """The width."""
        return self.width

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        chances = self.acceptance
        if chances is None:
            return []
        if not chances:
            return ["acceptance: at least the chance of the first child is needed"]
        if math.fsum(chances) > 1:
            return [f"acceptance: one child is accepted at most, so their sum is at most 1, got {math.fsum(chances):g}"]
        return []


@length_policies.register("sequoia", SequoiaSettings)
class Sequoia(WholeBudget):
    """The shape is fixed before the round, so the tree is lossless whatever was measured.

    Until it is calibrated it drafts a tree whose first children have `width` children each, and measures. Verdicts of later rounds do
    not change the shape.

    Source: Chen et al. 2024, Sequoia, arXiv 2402.12374: the tree by dynamic programming, drawn without replacement, and its size and
    depth by the times of the machine.
    """

    def __init__(self, settings: SequoiaSettings | None = None) -> None:
        self.settings = settings or SequoiaSettings()
        self.counts = RankCounts.of(self.settings.width)
        self._trials = [
            _form(_spine(nodes, self.settings))
            for nodes in sorted({self.settings.nodes, min(self.settings.nodes, self.settings.width)})
        ]
        self._form: StaticForm | None = None
        self._turns: dict[str, int] = defaultdict(int)
        """By text, its rounds so far."""
        if self.settings.acceptance is not None and self.settings.num_draft_tokens is not None:
            self._choose(self.settings.acceptance, cost=None)

    @property
    def shape(self) -> Shape | None:
        """The chosen tree; None: it is not calibrated yet."""
        return None if self._form is None else self._form.shape

    def budget(self, context: Context) -> Budget:
        # Trees of two sizes, by turns, show what a node costs the target.
        if self._form is not None:
            return self._form.budget()
        turn = self._turns[context.id]
        self._turns[context.id] += 1
        return self._trials[turn % len(self._trials)].budget()

    def observe(self, verdict: Verdict) -> None:
        """Count which children were accepted."""
        for rejected, accepted in verdict.tested:
            self.counts.add(rejected, accepted=accepted)

    def calibrate(self, generations: Sequence[Generation], events: Sequence[ForwardEvent] = ()) -> None:
        """Choose the tree by the verdicts so far, and by the times of these calls if its size is to be chosen.

        Args:
            generations: Outputs of the calls.
            events: Calls of both models.
        """
        if self._form is not None:
            return
        cost = None
        if self.settings.num_draft_tokens is None:
            levels = sum(one.max_depth for generation in generations for one in generation.rounds)
            cost = RoundCost.of(events, levels=levels)
        self._choose(self.settings.acceptance or self.counts.acceptance(), cost=cost)

    def _choose(self, acceptance: Sequence[float], cost: RoundCost | None) -> None:
        trees = BestTrees(acceptance[: self.settings.width], nodes=self.settings.nodes, depth=self.settings.levels)
        levels, nodes = len(trees.accepted_LM) - 1, self.settings.nodes
        if cost is not None:
            sizes = [(level, size) for level in range(1, levels + 1) for size in range(level, nodes + 1)]
            levels, nodes = max(
                sizes,
                key=lambda one: (1 + trees.accepted_LM[one[0]][one[1]]) / cost.seconds(levels=one[0], nodes=one[1]),
            )
        self._form = _form(trees.shape(nodes=nodes, levels=levels))


@dataclass(frozen=True)
class RoundCost:
    """The time of a round, linear in the levels that are drafted and in the nodes that are verified."""

    level: float
    call: float
    token: float
    sequences: float
    """Decoded together, on average."""

    @classmethod
    def of(cls, events: Sequence[ForwardEvent], *, levels: int) -> RoundCost | None:
        """Return the least squares over measured calls; None: there were none of the target.

        Args:
            levels: Levels drafted in all rounds of all sequences.
        """
        rounds = [event for event in events if not event.prefill]
        target = [event for event in rounds if event.model == "target"]
        if not target or not levels:
            return None
        sequences = sum(event.shape.num_sequences for event in target) / len(target)
        drafting = sum(event.seconds for event in rounds if event.model != "target")
        sizes, seconds = [event.shape.num_tokens for event in target], [event.seconds for event in target]
        mean_size, mean = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        spread = sum((size - mean_size) ** 2 for size in sizes)
        together = sum((size - mean_size) * (one - mean) for size, one in zip(sizes, seconds, strict=True))
        # A call with more tokens does not take less time: noise may say so.
        token = min(max(0.0, together / spread if spread else 0.0), mean / mean_size)
        return cls(drafting * sequences / levels, mean - token * mean_size, token, sequences)

    def seconds(self, *, levels: int, nodes: int) -> float:
        """Return the time of a round of all sequences."""
        return self.level * levels + self.call + self.token * self.sequences * (nodes + 1)


def _form(shape: Shape) -> StaticForm:
    return StaticForm(shape, DrawMode.WITHOUT_REPLACEMENT)


def _spine(nodes: int, settings: SequoiaSettings) -> Shape:
    """Return a tree of so many nodes whose first children have `width` children each."""
    levels = [min(settings.width, nodes - begin) for begin in range(0, nodes, settings.width)][: settings.levels]
    shape: Shape = ()
    for count in reversed(levels):
        shape = (shape, *(() for _ in range(count - 1)))
    return shape
