"""A frozen target ignores the training's autocast; a drafter in training does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import JointSettings, MedusaSettings
from drafttrain.target_model import Target
from drafttrain.target_model.documents import document_states
from drafttrain.target_model.logits import head_logits
from tests.conftest import byte_tokenizer, random_llama

TOKENS_BT = torch.arange(1, 25).view(2, 12)
POSITIONS_BT = torch.tensor([[*range(5), *range(7)], [*range(12)]])
NEEDS = TargetNeeds(hidden=(1,), final=True, logits=True)


@contextmanager
def bf16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def target_of(dtype: torch.dtype) -> Target:
    return Target(random_llama().to(dtype), byte_tokenizer(), name="tiny", fingerprint="")


def known(target: Target) -> list[Tensor]:
    """Return all outputs of a target: states, logits, rows, and the head's product."""
    seen = target.read(TOKENS_BT, POSITIONS_BT, NEEDS)
    assert seen.final_BTD is not None
    assert seen.logits_BTV is not None
    rows_NV = target.rows_of(seen).at(torch.tensor([3, 17]))
    return [seen.final_BTD, seen.hidden_BTD[1], seen.logits_BTV, rows_NV, head_logits(target.model, seen.final_BTD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_is_the_same_under_autocast_bit_for_bit(dtype: torch.dtype) -> None:
    target = target_of(dtype)
    plain = known(target)
    with bf16():
        under = known(target)
    for one, other in zip(plain, under, strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.equal(one, other)


def test_control_the_model_itself_is_rounded_by_autocast() -> None:
    target = target_of(torch.float32)
    plain_BTV = target.model(TOKENS_BT).logits
    with bf16():
        under_BTV = target.model(TOKENS_BT).logits
    assert not torch.equal(plain_BTV, under_BTV.float())


def test_a_drafter_in_training_stays_under_autocast() -> None:
    model: Any = random_llama(num_layers=1)
    drafter = CausalLMDrafter(model)
    batch = DraftBatch(TOKENS_BT, TOKENS_BT > 0, torch.zeros_like(TOKENS_BT), POSITIONS_BT, weight_of_step=1.0)
    with bf16():
        drafted = drafter(batch)
        logits_NV = drafted.head(drafted.states_BTD[1].flatten(0, 1), 1)
    assert logits_NV.dtype == torch.bfloat16


def test_a_target_with_adapters_that_add_nothing_is_itself_under_autocast() -> None:
    """Medusa-2 compares the two: with different rounding, the adapter would be trained on rounding errors."""
    target = target_of(torch.float32)
    settings = MedusaSettings(num_heads=1, joint=JointSettings())
    drafter = Medusa.create(settings, target=target, tokenizer=target.tokenizer)
    assert drafter.adapter is not None
    plain_BTD, _ = document_states(target.model, TOKENS_BT, POSITIONS_BT)
    with bf16(), drafter.adapter.applied(target.model):
        adapted_BTD, _ = document_states(target.model, TOKENS_BT, POSITIONS_BT)
    assert torch.equal(adapted_BTD, plain_BTD)
    assert adapted_BTD.requires_grad
