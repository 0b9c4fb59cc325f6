"""What an evaluation promises of a drafter with so many draft tokens, and whether a served figure keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

TOLERANCE = 0.02
"""Relative, of block efficiency: server and evaluator count the ends of a text differently, and round differently."""

Verdict = Literal["kept", "above", "below"]


@dataclass(frozen=True)
class Promise:
    """Block efficiency with its 95 % interval over prompts; by position where this very length was decoded."""

    value: float
    low: float | None
    """None: one prompt has no interval."""
    high: float | None
    acceptance_by_position: Sequence[float] | None
    measured: str
    """decoded: at this draft length; replay: computed from the rows of a decoding at another one."""
    num_prompts: int | None = None
    """None: an evaluation of an earlier version, which does not tell."""

    def verdict(self, low: float, high: float) -> Verdict:
        """Hold a served block efficiency against the promise; kept: within the interval or the tolerance, whichever is wider.

        Args:
            low, high: Between what it may be; on the very prompts of the evaluation both are the figure itself.
        """
        lowest, highest = (self.value if bound is None else bound for bound in (self.low, self.high))
        if high < min(lowest, self.value * (1 - TOLERANCE)):
            return "below"
        if low > max(highest, self.value * (1 + TOLERANCE)):
            return "above"
        return "kept"

    def json(self) -> dict[str, Any]:
        """Return what server.json holds."""
        return asdict(self)


def promise_of(result: Mapping[str, Any], *, temperature: float, num_draft_tokens: int) -> Promise | None:
    """Return what an evaluation promises at a temperature with chains of so many draft tokens; None: nothing.

    Args:
        result: What `evaluate` returned.
    """
    arms = _fixed_arms(result, temperature=temperature)
    for length, figures in arms:
        if length == num_draft_tokens:
            return _promise(figures["block_efficiency"], figures["acceptance_by_position"], "decoded")
    for _, figures in arms:
        if str(num_draft_tokens) in figures["replay"]:
            return _promise(figures["replay"][str(num_draft_tokens)], None, "replay")
    return None


def _fixed_arms(result: Mapping[str, Any], *, temperature: float) -> list[tuple[int, Mapping[str, Any]]]:
    """Return (draft tokens, figures) of the judged drafter's chains of a fixed length at a temperature, without loss."""
    part = next((one for one in result["temperatures"] if one["temperature"] == temperature), None)
    judged = next(iter(result["drafters"]))
    found = []
    for name, figures in part["drafters"].items() if part else ():
        # An evaluation of an earlier version has one length, which its settings tell.
        length = figures.get("length", result["settings"]["length"])
        is_judged = name == judged or name.startswith(f"{judged} (")
        if is_judged and length["kind"] == "fixed" and figures.get("exactness", result["exactness"]) != "lossy":
            found.append((length["num_draft_tokens"], figures))
    return found


def _promise(figure: Mapping[str, float | None], by_position: Sequence[float] | None, measured: str) -> Promise:
    value = figure["value"]
    assert value is not None, "an evaluation has at least one round"
    count = figure.get("num_prompts")
    return Promise(value, figure["low"], figure["high"], by_position, measured, None if count is None else int(count))
