"""Counters of a live server, read from its /metrics page in Prometheus text and summed over label sets."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Self

from drafttrain.core.errors import DataError
from drafttrain.serving.engines import CounterNames


@dataclass(frozen=True)
class LiveCounters:
    """Counters at one moment, or their increase between two moments."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted: int
    accepted_at: tuple[int, ...]
    """One entry for each draft position of a round."""
    num_requests: int
    num_tokens: int

    def __sub__(self, before: Self) -> LiveCounters:
        return LiveCounters(
            num_drafts=self.num_drafts - before.num_drafts,
            num_draft_tokens=self.num_draft_tokens - before.num_draft_tokens,
            num_accepted=self.num_accepted - before.num_accepted,
            accepted_at=tuple(new - old for new, old in zip(self.accepted_at, before.accepted_at, strict=True)),
            num_requests=self.num_requests - before.num_requests,
            num_tokens=self.num_tokens - before.num_tokens,
        )


def read_counters(page: str, names: CounterNames, *, where: str) -> LiveCounters:
    """Return the counters of a page, summed over engines and processes.

    Args:
        where: Address of the page, for messages.

    Raises:
        DataError: The page is not Prometheus text or lacks a counter: the server does not speculate, or is another engine.
    """
    # Imported here, so that only check-server needs the package.
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = defaultdict(float)
    by_position: dict[int, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(page):
            if family.type == "counter":
                # The counter exists, even if it has no sample yet.
                sums[f"{family.name}_total"] += 0
            for sample in family.samples:
                sums[sample.name] += sample.value
                if sample.name == names.accepted_at:
                    by_position[int(sample.labels["position"])] += sample.value
        found = {
            name: int(sums[called]) for name, called in vars(names).items() if name != "accepted_at" and called in sums
        }
    except (ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{where}: not Prometheus text: {type(error).__name__}: {error}") from error
    missing = [called for called in vars(names).values() if called not in sums]
    if missing == [names.num_drafts, names.num_draft_tokens, names.num_accepted, names.accepted_at]:
        raise DataError(f"{where}: has no counter {names.num_drafts}: the server decodes without a drafter")
    if missing or sorted(by_position) != list(range(len(by_position))):
        lacking = ", ".join(missing) or "some of the draft positions"
        raise DataError(f"{where}: has no counter {lacking}: it is another engine or another version")
    return LiveCounters(accepted_at=tuple(int(by_position[i]) for i in range(len(by_position))), **found)
