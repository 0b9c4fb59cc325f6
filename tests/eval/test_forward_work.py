"""The work of every forward: its operations are those that PyTorch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drafttrain.core.flops import attention
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.texts import Prompt
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.target_model import Target
from drafttrain.target_model.matrix_products import query_width
from tests.conftest import random_llama
from tests.drafters.block_models import block_drafter, block_target
from tests.drafters.eagle_models import eagle_drafter, eagle_target
from tests.drafters.p_eagle_models import p_eagle
from tests.eval.decoding import decode

PROMPTS = [Prompt(str(row), list(range(1 + row, 9 + row))) for row in range(2)]


def _pairs(query: Any, keys: Any, *_: Any, **__: Any) -> int:
    """Count all pairs of queries and columns, masked ones too: a kernel with a mask computes them."""
    return attention(query[1] * query[3], query[0] * query[2] * keys[2], gradients=0).flops


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _pairs}


def counted(target: Target, drafter: Any, prompts: list[Prompt]) -> list[tuple[ForwardEvent, int]]:
    """Decode some rounds; return every forward with the operations that PyTorch counted until it ended since the last one."""
    found: list[tuple[ForwardEvent, int]] = []
    before = 0
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)

    def listen(event: ForwardEvent) -> None:
        nonlocal before
        # Angles of positions are computed as products, which nobody counts as work.
        by_module = counter.get_flop_counts().items()
        angles = sum(sum(found.values()) for name, found in by_module if "rotary" in name.lower())
        flops = counter.get_total_flops() - angles
        found.append((event, flops - before))
        before = flops

    proposer, policy = drafter.proposer(target, listen), FixedLength(FixedLengthSettings(2))
    with counter:
        decode(target, proposer, prompts=prompts, new=8, policy=policy, listener=listen, stop_tokens=())
    return found


def masked_pairs(shape: ForwardShape) -> int:
    """Return the pairs of a token and a later one of its call: sequences here are equally long."""
    each = shape.num_tokens // shape.num_sequences
    return shape.num_sequences * each * (each - 1) // 2


def causal_lm(target: Target) -> Any:
    from drafttrain.drafters.causal_lm.module import CausalLMDrafter

    return CausalLMDrafter(random_llama(num_layers=1, hidden_size=16, seed=3).double())


KINDS: dict[str, Any] = {
    # How its target and its drafter are made, and the width of the query heads of all its layers together.
    "causal_lm": (eagle_target, causal_lm, 16),
    "eagle": (eagle_target, lambda target: eagle_drafter("eagle", target), 32),
    "eagle3": (eagle_target, lambda target: eagle_drafter("eagle3", target), 32),
    "p_eagle": (eagle_target, p_eagle, 2 * 32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_an_event_are_those_that_pytorch_runs(kind: str) -> None:
    build, drafter, width = KINDS[kind]
    target = build()
    found = counted(target, drafter(target), PROMPTS[:1])
    names = {event.model for event, _ in found}
    assert names == {"target", "drafter"}
    widths = {"target": 4 * 32, "drafter": width}
    for event, flops in found:
        # A kernel with a mask also computes what the mask hides.
        seen_by_mask = attention(widths[event.model], masked_pairs(event.shape), gradients=0).flops
        assert event.work.flops + seen_by_mask == flops, (event.model, event.shape)
    assert any(event.shape.head_rows == 0 for event, _ in found), "a prefill without the head is among them"


def test_the_operations_of_a_decoding_with_blocks_are_those_that_pytorch_runs() -> None:
    """DFlash reports a pass before its head runs, so the sum over the whole decoding is compared."""
    target = block_target()
    found = counted(target, block_drafter(target), PROMPTS[:1])
    layers, width = target.model.config.num_hidden_layers, query_width(target.model.config)
    hidden = sum(masked_pairs(event.shape) for event, _ in found if event.model == "target")
    said = sum(event.work.flops for event, _ in found)
    assert said + attention(layers * width, hidden, gradients=0).flops == sum(flops for _, flops in found)
