"""Eight bits: no feature is off by more than half a step of its own group, whatever other groups and tokens hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafttrain.core.eight_bit import GROUP, LARGEST, as_states, from_eight_bits, in_eight_bits, stored_width

WHOLE = 1 << 20


def states(width: int) -> Tensor:
    """Return states_ND with one huge feature, and tokens of very different sizes."""
    made_ND = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    made_ND[:, 3] *= 1000
    return made_ND * torch.logspace(-4, 4, 9)[:, None]


def worst(states_ND: Tensor, read_ND: Tensor) -> float:
    """Return the largest error, in steps of the group of the feature."""
    errors = zip(states_ND.split(GROUP, dim=1), (read_ND - states_ND).split(GROUP, dim=1), strict=True)
    return max(
        float((off_NF.abs() / (group_NF.abs().amax(dim=1, keepdim=True) / LARGEST)).max())
        for group_NF, off_NF in errors
    )


@pytest.mark.parametrize("width", [64, 70, 7])
def test_no_feature_is_off_by_more_than_half_a_step_of_its_group(width: int) -> None:
    states_ND = states(width)
    stored_NS = in_eight_bits(states_ND)
    assert stored_NS.dtype == torch.int8
    assert stored_NS.shape == (9, stored_width(width))
    # The scale is rounded to 8 bits: the largest feature may lie a quarter of a step beyond the last integer.
    assert worst(states_ND, from_eight_bits(stored_NS)) < 0.76


def test_control_a_scale_a_token_or_over_tokens_spoils_small_features() -> None:
    states_ND = states(64)
    a_token = from_eight_bits(in_eight_bits(states_ND, group=WHOLE), group=WHOLE)
    over_tokens = from_eight_bits(in_eight_bits(states_ND.T, group=WHOLE), group=WHOLE).T
    assert worst(states_ND, a_token) > 10
    assert worst(states_ND, over_tokens) > 10


def test_zeros_stay_zeros_and_padding_is_a_state_of_zeros() -> None:
    assert not from_eight_bits(in_eight_bits(torch.zeros(2, 3, 40))).any()
    assert torch.equal(from_eight_bits(torch.zeros(2, 3, stored_width(40), dtype=torch.int8)), torch.zeros(2, 3, 40))


def test_only_eight_bits_are_restored() -> None:
    half_ND = torch.randn(2, 8).bfloat16()
    assert as_states(half_ND) is half_ND
    assert as_states(in_eight_bits(half_ND)).dtype == torch.float32
