"""A value with its 95 % interval over prompts, and how values, bounds and p-values are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

RELIABLE_PROMPTS = 8
"""An interval over fewer prompts is printed with a note that it is not reliable."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over prompts; one prompt has none, and the bounds are nan."""

    value: float
    low: float
    high: float
    num_prompts: int | None = None
    """None: an eval.json of an earlier version, which does not store it."""

    def __str__(self) -> str:
        return self.text(3)

    def text(self, digits: int = 2) -> str:
        """Return `2.71 [2.60, 2.82]`, with a note where the interval is over fewer than 8 prompts."""
        return " ".join([number(self.value, digits), *self.bounds(digits)])

    def bounds(self, digits: int = 2) -> list[str]:
        """Return the bounds in brackets, then a note on their reliability if one is needed."""
        count = self.num_prompts
        if self.low != self.low:
            return ["(no interval)" if count is None else f"(no interval, n = {count:g})"]
        found = [f"[{number(self.low, digits)}, {number(self.high, digits)}]"]
        return [*found, f"(not reliable, n = {count:g})"] if count is not None and count < RELIABLE_PROMPTS else found

    def json(self) -> dict[str, Any]:
        """Return the interval as JSON files hold it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison(Interval):
    """Two ways of decoding the same prompts; p < 0.05 where the interval excludes that they are equal."""

    p_value: float
    """Two-sided; nan for one prompt."""

    def interval(self) -> Interval:
        """Return the interval without the p-value."""
        return Interval(self.value, self.low, self.high, self.num_prompts)

    def json(self) -> dict[str, Any]:
        """Return the interval as JSON files hold it, without the p-value."""
        return self.interval().json()


def interval_of(content: Mapping[str, Any]) -> Interval:
    """Return the interval of a JSON object; other keys are ignored."""
    value, low, high = (float("nan") if content[name] is None else content[name] for name in ("value", "low", "high"))
    return Interval(value, low, high, content["num_prompts"])


def p_value(value: float | None) -> str:
    """Return `p = 0.012`; one prompt has none."""
    return "p n/a" if value is None or value != value else f"p = {value:.3g}"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with this many digits; `n/a` where there was nothing to count."""
    return "n/a" if value is None or value != value else f"{value:z.{digits}f}"
