"""The heads as decoding runs them give the module's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from drafttrain.drafters.medusa.decoding import DecodingHeads
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def medusa(dtype: torch.dtype, **settings: Any) -> Medusa:
    target = Target(random_llama().to(dtype), byte_tokenizer(), name="tiny", fingerprint="")
    made = Medusa.create(MedusaSettings(num_heads=3, **settings), target=target, tokenizer=target.tokenizer).to(dtype)
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@torch.no_grad()
def difference(made: Medusa, decoding: DecodingHeads, *, num_heads: int = 3) -> float:
    """Return the largest difference of a logit, relative to the largest one."""
    final_MD = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(next(made.parameters()).dtype)
    found = torch.stack(decoding(final_MD, num_heads)).double()
    wanted = torch.stack([made.head(made.states(final_MD, k), k) for k in range(1, num_heads + 1)]).double()
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2}, {"shared_head": True}, {"draft_vocab_size": 40}])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_decoding_gives_the_logits_of_the_heads(settings: Any, num_heads: int) -> None:
    made = medusa(torch.float64, **settings)
    assert difference(made, made.decoding_heads(), num_heads=num_heads) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_differ_by_rounding(dtype: torch.dtype) -> None:
    made = medusa(dtype, num_layers=2)
    assert difference(made, made.decoding_heads()) < TOLERANCE[dtype]


def test_heads_in_another_order_are_noticed() -> None:
    made = medusa(torch.float64, shared_head=True)
    blocks = list(reversed(list(made.blocks)))
    assert difference(made, DecodingHeads(blocks, list(made.lm_heads), after=None)) > 1e-2  # type: ignore[arg-type]
