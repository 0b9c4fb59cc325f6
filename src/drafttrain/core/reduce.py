"""Rates as sums and counts, which are added first and divided once."""

from dataclasses import dataclass


@dataclass
class Rate:
    """A rate kept as numerator and denominator."""

    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: float) -> None:
        """Add a partial sum and its count."""
        self.total += float(total)
        self.count += float(count)

    def merge(self, other: "Rate") -> "Rate":
        """Return the rate over both parts."""
        return Rate(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The rate; nan when nothing was counted."""
        return self.total / self.count if self.count else float("nan")
