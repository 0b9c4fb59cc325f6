"""Thresholds of exits: no single exit has a better estimate, and confidence is used only where it says something."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch

from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.sorted_lm.module import FILE, SortedLMDrafter
from drafttrain.drafters.sorted_lm.thresholds import (
    LONGEST,
    NEVER,
    DraftCosts,
    ExitRows,
    chosen_thresholds,
    estimated_rate,
    exit_rows,
)
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.drafters.test_causal_lm_decoding import model

COSTS = DraftCosts([0.05, 0.3], head=0.02)


def by_hand(rows: ExitRows, thresholds: Sequence[float], costs: DraftCosts) -> float:
    """The same estimate, label by label."""
    tokens = cost = 0.0
    for begin in range(len(rows.left_N)):
        tokens, cost, reached = tokens + 1, cost + 1, 1.0
        for place in range(begin, begin + min(LONGEST, int(rows.left_N[begin]))):
            exits = range(len(thresholds))
            chosen = next((e for e in exits if rows.largest_NE[place, e] >= thresholds[e]), None)
            cost += costs.at(thresholds)[-1 if chosen is None else chosen]
            if chosen is None:
                break
            reached *= float(rows.rate_NE[place, chosen])
            tokens += reached
    return tokens / cost


def rows_of(*, informative: bool, count: int = 300) -> ExitRows:
    """Two exits: the first one is right at half of the labels, and confident there, or anywhere."""
    generator = torch.Generator().manual_seed(0)
    easy_N = torch.rand(count, generator=generator) < 0.5
    sure_N = easy_N if informative else torch.rand(count, generator=generator) < 0.5
    first_N, second_N = torch.where(easy_N, 0.95, 0.2), torch.full((count,), 0.9)
    largest = torch.stack([torch.where(sure_N, 0.9, 0.25), torch.full((count,), 0.8)], 1)
    left = torch.cat([torch.arange(30, 0, -1)] * (count // 30))
    return ExitRows(largest.double(), torch.stack([first_N, second_N], 1).double(), left)


@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.5, 0.0), (NEVER, 0.0), (0.5, 0.85), (0.95, NEVER)])
def test_the_estimate_is_that_of_rounds_from_every_label(thresholds: tuple[float, float]) -> None:
    rows = rows_of(informative=True, count=60)
    assert abs(estimated_rate(rows, thresholds, COSTS) - by_hand(rows, thresholds, COSTS)) < 1e-9


def test_an_exit_that_is_never_confident_costs_no_head() -> None:
    assert COSTS.at((0.5, 0.0)) == pytest.approx([0.07, 0.34])
    assert COSTS.at((NEVER, 0.0)) == pytest.approx([0.05, 0.32])


def test_exits_are_mixed_where_confidence_says_which_draft_is_right() -> None:
    rows = rows_of(informative=True)
    chosen, rate = chosen_thresholds(rows, COSTS)
    assert 0.25 < chosen[0] <= 0.9
    single = [estimated_rate(rows, one, COSTS) for one in ((0.0, 0.0), (NEVER, 0.0))]
    assert rate > max(single) + 0.02
    # The control: a confidence that says nothing. Mixing by it gains nothing beside stopping where the first exit is unsure.
    blind = rows_of(informative=False)
    _, without = chosen_thresholds(blind, COSTS)
    assert without < rate - 0.1
    assert without >= max(estimated_rate(blind, one, COSTS) for one in product((0.0, NEVER), (0.0,)))


def test_dear_drafts_that_are_mostly_wrong_are_not_drafted() -> None:
    rows = ExitRows(torch.full((60, 2), 0.5).double(), torch.full((60, 2), 0.1).double(), torch.arange(60, 0, -1))
    chosen, rate = chosen_thresholds(rows, DraftCosts([0.5, 0.9], head=0.1))
    assert rate == max(rate, estimated_rate(rows, (0.0, 0.0), DraftCosts([0.5, 0.9], head=0.1)))
    # Asking an exit costs more than it brings; at least one is asked in each round.
    assert all(threshold > 0.5 for threshold in chosen)


def test_thresholds_are_calibrated_for_a_target_on_its_texts() -> None:
    made = model(num_hidden_layers=4, vocab_size=257, dtype=torch.float32)
    # The target is the drafter itself: its last exit is always right, its first one hardly ever.
    target = Target(made, byte_tokenizer(), name="itself", fingerprint="itself")
    drafter = SortedLMDrafter(made)
    drafter._choose((1, 2), None, name="exits")
    records = [Record(str(i), list(range(5 + i, 35 + i)), [False] * 4 + [True] * 26) for i in range(3)]
    batch, _ = pack(records, width=60, weight_of_step=1.0)
    rows = exit_rows(drafter, target, [batch])
    assert rows.rate_NE.shape == (78, 3)
    assert rows.rate_NE[:, 2].min() > 0.999
    assert rows.rate_NE[:, 0].mean() < 0.9
    assert rows.left_N.tolist() == [*range(26, 0, -1)] * 3
    (found,) = drafter.calibrate(target, [batch]).items()
    assert found[0] == FILE
    assert found[1]["thresholds"] == {"itself": list(drafter.thresholds_for(target))}
    drafter.given = (0.0, 0.0, 0.0)
    assert not drafter.calibrate(target, [batch])
