"""Calibrated predictions of DSpark: temperatures found again, held-out predictions by hand, the file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.dspark.calibration import FILE, GRID, calibrated_temperatures, predictions
from drafttrain.drafters.dspark.dspark import DSpark
from tests.drafters.block_models import block_target
from tests.drafters.test_dspark import K, made, text


def rates(count: int = 4000) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.96 + 0.02


def test_a_prediction_that_is_the_rate_has_temperature_one():
    assert calibrated_temperatures(rates().logit(), rates()) == [1.0, 1.0, 1.0]


def test_temperatures_are_found_again_slot_by_slot():
    """Logits that are too large or too small by a factor of the grid."""
    wanted = torch.tensor([GRID[24], GRID[10], GRID[16]], dtype=torch.float64)
    found = calibrated_temperatures(rates().logit() * wanted, rates())
    assert found == wanted.tolist()
    # The control: without calibration of the first slot, the second one makes up for it.
    whole = rates().logit() * wanted
    passed = torch.cat([whole[:, :1], whole[:, 1:2]], dim=1)
    assert calibrated_temperatures(passed[:, 1:], rates()[:, :1] * rates()[:, 1:2]) != found[1:2]


def test_blocks_that_end_early_count_as_far_as_they_go():
    scores = rates().logit() * 2.0
    scores[::3, 1:] = torch.nan
    truth = rates()
    truth[::3, 1:] = torch.nan
    assert calibrated_temperatures(scores, truth) == [2.0, 2.0, 2.0]
    scores[:, 2] = torch.nan
    assert calibrated_temperatures(scores, truth)[2] == 1.0


def test_predictions_are_those_of_a_block_at_every_root():
    target = block_target()
    drafter: Any = made(target)
    tokens = text(10)
    mask = [False] * 3 + [True] * 7
    batch, _ = pack([Record("0", tokens, mask)], width=10, weight_of_step=1.0)
    scores_NK, rates_NK = predictions(drafter, target, [batch])
    # Roots 2 to 8: the first label of root 2 is the first trained one.
    assert scores_NK.shape == (7, K)
    assert [int((~row.isnan()).sum()) for row in scores_NK] == [4, 4, 4, 4, 3, 2, 1]
    assert torch.equal(scores_NK.isnan(), rates_NK.isnan())
    assert ((rates_NK >= 0) & (rates_NK <= 1) | rates_NK.isnan()).all()


def test_the_folder_keeps_the_temperatures_and_decoding_divides_by_them(tmp_path):
    target = block_target()
    drafter: Any = made(target)
    drafter.save(tmp_path)
    assert DSpark.load(tmp_path, target).temperatures == [1.0] * K
    batch, _ = pack([Record("0", text(), [True] * 14)], width=14, weight_of_step=1.0)
    files = drafter.calibrate(target, [batch])
    assert len(files[FILE]["temperatures"]) == K
    given = [0.5, 2.0, 1.0, 4.0]
    (tmp_path / FILE).write_text(json.dumps({"temperatures": given}))
    again = DSpark.load(tmp_path, target, dtype="float64")
    assert again.temperatures == given
    hidden, state = torch.randn(1, 32, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    plain, divided = (
        [one.proposer(target)._slot(slot, hidden, torch.zeros(1, 257), torch.tensor([3]), state) for slot in range(K)]
        for one in (drafter, again)
    )
    for slot, (one, other) in enumerate(zip(plain, divided, strict=True)):
        torch.testing.assert_close(other.confidence_M, one.confidence_M / given[slot])
    (tmp_path / FILE).write_text(json.dumps({"temperatures": [1.0]}))
    with pytest.raises(CheckpointError, match="must be 4 numbers above 0"):
        DSpark.load(tmp_path, target)
