"""What a live server counts, as its /metrics page says it in Prometheus text: sums over label sets, compared before and after."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Self

from drafttrain.core.errors import DataError
from drafttrain.serving.engines import CounterNames


@dataclass(frozen=True)
class LiveCounters:
    """Counters at a moment, or what they rose by between two."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted: int
    accepted_at: tuple[int, ...]
    """As many as the server drafts tokens in a round."""
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
    """Return the counters of a page; the same counter of several engines or processes is added up.

    Args:
        where: Its address, for messages.

    Raises:
        DataError: The page is not in this form, or lacks a counter: the server does not speculate, or is another engine.
    """
    # Imported here: reading exports needs no such page.
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = defaultdict(float)
    by_position: dict[int, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(page):
            if family.type == "counter":
                # Known, and not counted yet under any label.
                sums[f"{family.name}_total"] += 0
            for sample in family.samples:
                sums[sample.name] += sample.value
                if sample.name == names.accepted_at:
                    by_position[int(sample.labels["position"])] += sample.value
        found = {
            name: int(sums[called]) for name, called in vars(names).items() if name != "accepted_at" and called in sums
        }
    except (ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{where}: not counters in Prometheus text: {type(error).__name__}: {error}") from error
    missing = [called for called in vars(names).values() if called not in sums]
    if missing == [names.num_drafts, names.num_draft_tokens, names.num_accepted, names.accepted_at]:
        raise DataError(
            f"{where}: counts no drafts ({names.num_drafts} is missing): the server decodes without a drafter"
        )
    if missing or sorted(by_position) != list(range(len(by_position))):
        lacking = ", ".join(missing) or "some of the draft positions"
        raise DataError(f"{where}: {lacking} not counted here: another engine, or another version of it")
    return LiveCounters(accepted_at=tuple(int(by_position[i]) for i in range(len(by_position))), **found)
