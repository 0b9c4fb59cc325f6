"""Which exit drafts how many tokens: acceptance by exit, costs by exit, and the choice with the most tokens per cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.eval.clock import TARGET

FIRST_BLOCKS = f"{TARGET}'s first blocks"
SHADOWS = "exits in the shadow"
"""Name of the calls of the head that only observe, in the ledger."""


@dataclass(frozen=True)
class ExitCosts:
    """The cost of a round by its exit, in any unit: `of_round`, and `of_token` for each draft token."""

    of_token: Mapping[int, float]
    of_round: Mapping[int, float]

    @classmethod
    def in_blocks(cls, exits: Sequence[int], num_blocks: int) -> ExitCosts:
        """Return the costs in passes of one block: d draft tokens run their exit's blocks d times beside one whole pass.

        The root and the draft tokens run the first l blocks in d + 1 calls, and the others in one: d l + L.
        """
        return cls({one: float(one) for one in exits}, dict.fromkeys(exits, float(num_blocks)))

    @classmethod
    def measured(
        cls, exits: Sequence[int], num_blocks: int, generations: Sequence[Generation], events: Sequence[ForwardEvent]
    ) -> ExitCosts | None:
        """Return the costs in seconds, from outputs in whose rounds several exits drafted; None: fewer than two did.

        A call costs a line over the number of its blocks. What rounds take beside their calls, and calls that only observe,
        are added.
        """
        first = _by_blocks(events, FIRST_BLOCKS)
        rest = {num_blocks - blocks: seconds for blocks, seconds in _by_blocks(events, TARGET).items()}
        drafted = sorted(first.keys() & rest.keys())
        if len(drafted) < 2:
            return None
        calls, rounds = sum(map(len, first.values())), sum(map(len, rest.values()))
        drafting = sum(one.draft_seconds for one in generations) - sum(map(sum, first.values()))
        verifying = sum(one.verify_seconds for one in generations) - sum(map(sum, rest.values()))
        first_line, rest_line = (_line({one: fmean(of[one]) for one in drafted}) for of in (first, rest))
        # The first blocks run once more than there are draft tokens: they read the root too.
        beside_token, beside_round = max(0.0, drafting) / calls, max(0.0, verifying) / rounds
        return cls(
            {one: max(0.0, first_line(one)) + beside_token for one in exits},
            {one: max(0.0, first_line(one)) + max(0.0, rest_line(one)) + beside_token + beside_round for one in exits},
        )

    def __call__(self, exit_layer: int, num_tokens: int) -> float:
        """Return the cost of a round."""
        return self.of_round[exit_layer] + num_tokens * self.of_token[exit_layer]


def _by_blocks(events: Sequence[ForwardEvent], name: str) -> dict[int, list[float]]:
    """Return the seconds of the calls of a name in the rounds, by their number of blocks."""
    found: dict[int, list[float]] = {}
    for event in events:
        if event.model == name and not event.prefill:
            found.setdefault(event.shape.num_layers, []).append(event.seconds)
    return found


def _line(values: Mapping[int, float]) -> np.poly1d:
    return np.poly1d(np.polyfit(list(values), list(values.values()), 1))


def expected_tokens(acceptance: float, num_tokens: int) -> float:
    """Return the expected tokens of a round, if each draft token after accepted ones is accepted with this chance.

    Source: Leviathan et al. 2022, arXiv 2211.17192, equation 1.
    """
    return sum(acceptance**count for count in range(num_tokens + 1))


def best_draft(acceptance: Mapping[int, float], costs: ExitCosts, *, most: int) -> tuple[int, int]:
    """Return the exit, and the number of draft tokens of 0..most, with the most expected tokens per cost; of equal ones the first.

    Tokens rise ever more slowly with the length, and costs linearly, so that their ratio has one peak: of each exit, lengths are
    tried until it falls.

    Args:
        acceptance: Chance that a draft token is accepted, by exit.
    """
    best, choice = -1.0, (min(acceptance), 0)
    for exit_layer, chance in sorted(acceptance.items()):
        tokens, alive, peak = 1.0, 1.0, 0.0
        for count in range(most + 1):
            rate = tokens / costs(exit_layer, count)
            if rate < peak:
                break
            peak = rate
            if rate > best:
                best, choice = rate, (exit_layer, count)
            alive *= chance
            tokens += alive
    return choice


class ExitRecord:
    """What was seen of one exit: how often its tokens were accepted, and how sure it was of these and of the others.

    Args:
        decay: Factor on everything older, at each `add`.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._accepted, self._rejected = 0.0, 0.0
        self._sure_accepted, self._sure_rejected = 0.0, 0.0

    def add(self, accepted: Sequence[float], confidence: Sequence[float]) -> None:
        """Add tokens.

        Args:
            accepted: The chance of each that it is accepted.
            confidence: The largest probability of the distribution that each is drawn from.
        """
        pairs = list(zip(accepted, confidence, strict=True))
        self._accepted = self._decay * self._accepted + sum(accepted)
        self._rejected = self._decay * self._rejected + sum(1 - one for one in accepted)
        self._sure_accepted = self._decay * self._sure_accepted + sum(one * sure for one, sure in pairs)
        self._sure_rejected = self._decay * self._sure_rejected + sum((1 - one) * sure for one, sure in pairs)

    @property
    def known(self) -> bool:
        """Tokens were seen."""
        return self._accepted + self._rejected > 0

    @property
    def acceptance(self) -> float:
        """The decayed mean; only once it is known."""
        return self._accepted / (self._accepted + self._rejected)

    @property
    def threshold(self) -> float:
        """The middle between the mean confidences of accepted and of rejected tokens; 0 as long as either is not known.

        0 too where rejected ones are the surer ones: then confidence says nothing.
        """
        if self._accepted <= 0 or self._rejected <= 0:
            return 0.0
        accepted, rejected = self._sure_accepted / self._accepted, self._sure_rejected / self._rejected
        return (accepted + rejected) / 2 if accepted > rejected else 0.0
