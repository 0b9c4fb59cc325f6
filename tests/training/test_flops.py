"""The operations that a step needs, against those that torch counts when it takes one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import MixtralConfig, MixtralForCausalLM

from drafttrain.core.batches import DraftBatch
from drafttrain.core.flops import BatchShape, RolloutShape, attention, matrix, parameters_of, total
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.drafters.medusa.settings import JointSettings
from drafttrain.losses import losses
from drafttrain.losses.align import planned
from drafttrain.target_model import Target
from drafttrain.target_model.matrix_products import trunk_products
from drafttrain.training.flops import distill_flops
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama

ROWS, LENGTH = 3, 12


def scores_and_sums(query: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
    """Count the products of the pairs that look at each other: queries are at the last columns, each sees up to its own."""
    rows, heads, queries, width = query.shape
    pairs = rows * (queries * keys.shape[2] - queries * (queries - 1) // 2)
    return 2 * attention(heads * width, pairs, gradients=0).multiplications


def their_gradients(_: Any, query: Any, keys: Any, values: Any, *__: Any, **___: Any) -> int:
    """Count the products of the gradients; that the kernel computes the scores again is not needed."""
    return 2 * scores_and_sums(query, keys, values)


aten = torch.ops.aten
FORMULAS = flop_registry | {
    # Torch does not count these.
    aten._scaled_dot_product_flash_attention_for_cpu: scores_and_sums,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: their_gradients,
    aten.addmm_: flop_registry[aten.addmm],
}


class Executed(TorchDispatchMode):
    """Counts as torch.utils.flop_counter.FlopCounterMode does, whose hooks on modules a loss that calls autograd does not bear."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in FORMULAS:
            self.flops += FORMULAS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")


def of_step(step: int) -> list[DraftBatch]:
    """Return rows of one document each, without padding, of which the last eight tokens are trained."""
    records = [
        Record(str(i), [1 + (7 * step + i * j) % 250 for j in range(LENGTH)], [j >= 4 for j in range(LENGTH)])
        for i in range(1, ROWS + 1)
    ]
    return [pack(records, width=LENGTH, weight_of_step=24.0, step=step)[0]]


def drafter_of(kind: str, target: Target, settings: dict[str, Any]) -> Any:
    entry: Any = drafters.entry(kind)
    return entry.component.create(entry.settings(**settings), target=target, tokenizer=target.tokenizer).float()


def executed_and_needed(kind: str, loss: str, target: Target, settings: dict[str, Any], folder: Path) -> list[int]:
    """Return what torch counts of one step of `train`, and what we do."""
    drafter = drafter_of(kind, target, settings)
    (batch,) = of_step(0)
    # Whether a model tells documents apart is tried once, before it is counted.
    for model in (target.model, getattr(drafter, "model", target.model)):
        Target(model, target.tokenizer, name="", fingerprint="").read(
            batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True)
        )
    drafter.requires_grad_(True)
    with Executed() as executed, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        train(
            drafter,
            losses.build(losses.entry(loss).settings()),
            target=target,
            of_step=of_step,
            estimate=None,
            settings=TrainSettings(max_steps=1, batch_size=3, warmup_steps=0, loggers=["csv"], eval_every_steps=0),
            vocab_size=257,
            folder=folder,
        )
    with (folder / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    head = loss != "ce"
    needed = distill_flops(drafter, target, batch.shape, reads=head or drafter.needs() != TargetNeeds(), head=head)
    assert int(row["step_flops"]) == needed
    return [executed.flops, needed]


EXACT = [
    ("causal_lm", "ce", {"hidden_size": 48, "num_heads": 3}),
    ("causal_lm", "forward_kl", {"init": "target", "num_layers": 2}),
    ("sorted_lm", "ce", {"hidden_size": 48, "num_heads": 3, "num_layers": 3, "exits": [1, 2]}),
    ("matformer", "ce", {"hidden_size": 48, "num_heads": 3}),
    ("kangaroo", "forward_kl", {}),
    ("medusa", "ce", {"num_heads": 3, "num_layers": 2}),
    ("eagle", "ce", {"num_steps": 3}),
    ("eagle3", "forward_kl", {"num_steps": 1, "draft_vocab_size": 120}),
    ("eagle3", "forward_kl", {"num_steps": 1, "fc_norm": True}),
    ("mtp", "ce", {"init": "random", "num_steps": 2}),
    ("chimera", "ce", {"num_steps": 2, "draft_vocab_size": 120}),
]


@pytest.mark.parametrize(("kind", "loss", "settings"), EXACT)
def test_needed_operations_are_those_that_torch_counts(kind, loss, settings, target, tmp_path):
    executed, needed = executed_and_needed(kind, loss, target, settings, tmp_path)
    assert executed == needed


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("eagle3", {"num_steps": 3}), ("medusa", {"num_heads": 3}), ("medusa", {"joint": JointSettings()})],
)
def test_what_is_computed_more_than_once_is_not_needed(kind, settings, target, tmp_path):
    """The target's head for one position at several depths; and gradients below the first adapter, which nobody asks for."""
    executed, needed = executed_and_needed(kind, "forward_kl", target, settings, tmp_path)
    assert needed == pytest.approx(executed, rel=0.1)


def test_padding_and_other_documents_are_not_needed():
    records = [Record("a", [5] * 6, [True] * 6), Record("b", [6] * 4, [False, True, True, True])]
    narrow, wide = (pack(records, width=width, weight_of_step=8.0)[0].shape for width in (6, 16))
    assert narrow == wide
    assert wide == BatchShape(10, 6 * 7 // 2 + 4 * 5 // 2, 9, wide.early_labels, ((2, 5), (2, 3)))
    assert [wide.rows(shift) for shift in (0, 1, 2, 3, 6)] == [9, 8, 6, 4, 0]


def test_a_rollout_is_needed_where_a_label_is_reached_from():
    """Of label j at depth d the state is at j - d - 1: with two steps, of labels 5 and 6 of 9 at 2, 3, 4; of one at 1 nowhere."""
    records = [
        Record("a", [5] * 9, [i in (1, 5, 6) for i in range(9)]),
        Record("b", [6] * 4, [False, True, False, False]),
    ]
    shape = pack(records, width=16, weight_of_step=8.0)[0].shape
    assert shape.rollout(2) == RolloutShape(columns=5, queries=3, pairs=3 + 4 + 5)
    assert shape.rollout(9) == RolloutShape(columns=5, queries=5, pairs=15)


def test_a_batch_that_is_planned_is_counted_on_the_host():
    (batch,) = of_step(0)
    moved = planned(batch, []).to("meta")
    assert moved.shape == batch.shape
    assert moved.num_tokens == ROWS * LENGTH


def test_of_experts_those_that_a_token_is_sent_to_count():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=40, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)
    )
    shape = BatchShape(positions=10, pairs=55, labels=0)
    one_expert, router, projections = 3 * 16 * 32, 16 * 4, 4 * 16 * 16
    by_hand = [
        matrix(2 * one_expert + router + projections, 10, gradients=0),
        attention(16, 55, gradients=0),
    ]
    assert total(trunk_products(model, shape, gradients=0)) == total(by_hand)


def test_matrices_without_those_that_are_looked_up():
    module = torch.nn.Sequential(torch.nn.Embedding(7, 3), torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    assert parameters_of(module) == 15


@pytest.mark.parametrize("needs", [(0,), (3,), (4,), (-1,)])
def test_the_target_is_needed_up_to_the_states_that_are_read(target, needs: Sequence[int]):
    drafter = drafter_of("kangaroo", target, {})
    shape = of_step(0)[0].shape
    drafter.needs = lambda: TargetNeeds(hidden=tuple(needs))
    blocks = needs[0] if needs[0] >= 0 else 4
    alone = distill_flops(drafter, target, shape, reads=False, head=False)
    with_target = distill_flops(drafter, target, shape, reads=True, head=False)
    a_block = total(trunk_products(target.model, shape, gradients=0)) // 4
    assert with_target - alone == blocks * a_block
