"""The block efficiency that an evaluation promises at a draft length, and whether a server keeps the promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from drafttrain.eval.interval import Interval
from drafttrain.eval.result import DrafterFigures, Result

TOLERANCE = 0.02
"""Relative, of block efficiency: server and evaluator count the ends of a text differently, and round differently."""

Verdict = Literal["kept", "above", "below"]


@dataclass(frozen=True)
class Promise:
    """A block efficiency that a server should reach."""

    block_efficiency: Interval
    acceptance_by_position: Sequence[float] | None
    """None: another draft length was decoded."""
    measured: str
    """decoded: at this draft length; replay: computed from the rows decoded at another length."""

    def verdict(self, low: float, high: float) -> Verdict:
        """Compare a served block efficiency; kept: within the interval or the tolerance, whichever is wider.

        Args:
            low, high: Bounds of the served figure; on the evaluation's own prompts both are the figure itself.
        """
        promised = self.block_efficiency
        lowest, highest = (promised.value if bound != bound else bound for bound in (promised.low, promised.high))
        if high < min(lowest, promised.value * (1 - TOLERANCE)):
            return "below"
        if low > max(highest, promised.value * (1 + TOLERANCE)):
            return "above"
        return "kept"

    def json(self) -> dict[str, Any]:
        """Return what server.json holds."""
        promised = self.block_efficiency
        return {
            "value": promised.value,
            "low": promised.low,
            "high": promised.high,
            "acceptance_by_position": self.acceptance_by_position,
            "measured": self.measured,
            "num_prompts": promised.num_prompts,
        }


def promise_of(result: Result, *, temperature: float, num_draft_tokens: int) -> Promise | None:
    """Return the promise of an evaluation at a temperature and draft length; None: it makes none."""
    arms = _fixed_arms(result, temperature=temperature)
    for length, figures in arms if not result.changed_rounds else ():
        if length == num_draft_tokens:
            return Promise(figures.block_efficiency, figures.acceptance_by_position, "decoded")
    for _, figures in arms:
        if str(num_draft_tokens) in figures.replay:
            return Promise(figures.replay[str(num_draft_tokens)], None, "replay")
    return None


def _fixed_arms(result: Result, *, temperature: float) -> list[tuple[int, DrafterFigures]]:
    """Return (draft tokens, figures) of the judged drafter's lossless chains of fixed length at a temperature."""
    part = next((one for one in result.temperatures if one.temperature == temperature), None)
    judged = next(iter(result.drafters))
    return [
        (figures.length["num_draft_tokens"], figures)
        for name, figures in (part.drafters.items() if part else ())
        if (name == judged or name.startswith(f"{judged} ("))
        and figures.length["kind"] == "fixed"
        and not figures.lossy
    ]
