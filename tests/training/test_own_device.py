"""A drafter on another device than its target: what it takes of the target goes there and comes back.

Here without a second device: the target is on `meta`, which has no values, and a copy from there to the CPU is an error that
tells how far a call has come: to the target's module, by input that is where it is, and back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetOutput
from drafttrain.drafters import drafters
from drafttrain.drafters.eagle.eagle3 import Eagle3Drafter, Eagle3Settings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama

THERE_AND_BACK = "Cannot copy out of meta tensor"
KINDS: dict[str, dict[str, Any]] = {
    "kangaroo": {"exit_layer": 1},
    "eagle": {"num_steps": 2, "feature_noise": 0.0, "feature_weight": 0.0},
    "eagle3": {"num_steps": 2},
}
"""Kinds that use modules of their target in training; Medusa's heads and a causal LM read only states or the distribution."""


def elsewhere(target: Target) -> Target:
    """Move a target to a device without values; its embedding and head refuse what is not there."""

    def refuse(module: torch.nn.Module, inputs: Any) -> None:
        if not inputs[0].is_meta:
            raise RuntimeError("an operation on two devices")

    target.model.to("meta")
    for module in (target.model.get_input_embeddings(), target.model.get_output_embeddings()):
        module.register_forward_pre_hook(refuse)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_the_target_are_used_where_they_are(kind: str) -> None:
    target = Target(random_llama(num_layers=3), byte_tokenizer(), name="tiny", fingerprint="")
    entry: Any = drafters.entry(kind)
    drafter = entry.component.create(entry.settings(**KINDS[kind]), target=target, tokenizer=target.tokenizer)
    tokens_BT = torch.ones(2, 9, dtype=torch.long)
    states_BTD = torch.ones(2, 9, 32)
    seen = TargetOutput(hidden_BTD=dict.fromkeys(drafter.needs().hidden, states_BTD), final_BTD=states_BTD)
    positions_BT, documents_BT = torch.arange(9).repeat(2, 1), torch.arange(2)[:, None].repeat(1, 9)
    batch = DraftBatch(tokens_BT, tokens_BT > 0, positions_BT, documents_BT, weight_of_step=1.0, target=seen)
    drafted = drafter(batch)
    elsewhere(target)
    assert all(parameter.device.type == "cpu" for parameter in drafter.parameters())
    if kind != "kangaroo":
        with pytest.raises(NotImplementedError, match=THERE_AND_BACK):
            drafter(replace(batch, target=seen))
    if kind != "eagle3":
        with pytest.raises(NotImplementedError, match=THERE_AND_BACK):
            drafted.head(drafted.states_BTD[1].flatten(0, 1), 1)


def test_a_draft_vocabulary_takes_its_rows_of_the_head_where_they_are() -> None:
    """Here the drafter is on `meta`: the ids of its vocabulary are on their way to the target's head."""
    target = Target(random_llama(num_layers=3), byte_tokenizer(), name="tiny", fingerprint="")
    settings = Eagle3Settings(draft_vocab_size=40)
    drafter = Eagle3Drafter.create(settings, target=target, tokenizer=target.tokenizer).to("meta")
    with pytest.raises(NotImplementedError, match=THERE_AND_BACK):
        drafter.start_head()


def test_the_distribution_of_rows_moves_to_the_device_of_the_request() -> None:
    target = elsewhere(Target(random_llama(), byte_tokenizer(), name="tiny", fingerprint=""))
    rows = target.rows_of(TargetOutput(final_BTD=torch.ones(2, 9, 32, device="meta")))
    with pytest.raises(NotImplementedError, match=THERE_AND_BACK):
        rows.at(torch.arange(4))


def test_control_an_operation_on_two_devices_is_refused() -> None:
    target = elsewhere(Target(random_llama(), byte_tokenizer(), name="tiny", fingerprint=""))
    with pytest.raises(RuntimeError, match="two devices"):
        target.model.get_output_embeddings()(torch.ones(5, 32))
