"""How often the two heads run in a training step: the target's once a position, the drafter's at most twice a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.target_rows import TargetNeeds, TargetRows
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import JointSettings, MedusaSettings
from drafttrain.losses import Loss, losses
from drafttrain.losses.align import align
from drafttrain.losses.step import drafted_loss
from drafttrain.target_model import Target
from drafttrain.target_model.logits import LiveRows
from tests.conftest import byte_tokenizer, random_llama
from tests.losses.test_losses import records

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("causal_lm", {"init": "scratch", "hidden_size": 12, "num_layers": 1, "num_heads": 2}),
    ("medusa", {"num_heads": 3}),
    ("kangaroo", {"exit_layer": 2}),
    ("eagle", {"num_steps": 3}),
    ("eagle3", {"num_steps": 3}),
    ("mtp", {"init": "random"}),
    ("eagle3", {"num_steps": 3, "draft_vocab_size": 100}),
]
EVERY_KIND = pytest.mark.parametrize(
    ("kind", "settings"), KINDS, ids=lambda value: value if isinstance(value, str) else ""
)


class Products(TorchDispatchMode):
    """Counts the rows of logits that are made with some output matrices."""

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__()
        self.storages = {matrix.untyped_storage().data_ptr() for matrix in matrices}
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            *_, left, right = args[:3]
            is_head = right.untyped_storage().data_ptr() in self.storages
            # The product of a gradient with the matrix has the matrix's width, logits have its height.
            if is_head and right.shape[0] == left.shape[1] and right.stride(0) == 1:
                self.rows += len(left)
        return out


class CountedRows:
    """A target's rows that count how often they are asked for."""

    def __init__(self, rows: TargetRows) -> None:
        self.inner = rows
        self.asked: list[Tensor] = []

    def at(self, index_N: Tensor) -> Tensor:
        self.asked.append(index_N)
        return self.inner.at(index_N)


def made(kind: str, settings: dict[str, Any]) -> tuple[Target, Any, DraftOutput, DraftBatch]:
    target = Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")
    entry: Any = drafters.entry(kind)
    torch.manual_seed(1)
    drafter = entry.component.create(entry.settings(**settings), target=target, tokenizer=target.tokenizer).train()
    # Several documents in a row, so that depths have different rows.
    batch, _ = pack(records(), width=20, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=CountedRows(target.rows_of(seen)))
    return target, drafter, drafter(batch), batch


@EVERY_KIND
@pytest.mark.parametrize("loss", ["lk_hybrid", "tvdpp", "block_acceptance"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_targets_head_runs_once_a_position_and_the_drafters_twice_a_row_at_most(kind, settings, loss, chunk):
    target, _, drafted, batch = made(kind, settings)
    chosen = losses.build(losses.entry(loss).settings())
    rows = align(drafted, batch, block_length=getattr(chosen, "block_length", 1))
    counted = batch.target_rows
    matrices = [drafted.head.linear(depth).weight for depth in drafted.states_BTD]
    shared = any(matrix is target.model.get_output_embeddings().weight for matrix in matrices)
    with Products(matrices) as products:
        total = drafted_loss(chosen, drafted, rows, batch, vocab_size=257, chunk_rows=chunk, measured=True).total
        total.backward()
    asked = torch.cat(counted.asked)
    assert asked.tolist() == rows.target_N.unique().tolist()
    drafters_own = products.rows - (len(asked) if shared else 0)
    assert len(rows.tokens_N) <= drafters_own <= 2 * len(rows.tokens_N)
    # A frozen matrix is read once even if rows depend on each other.
    if chosen.pointwise or not any(matrix.requires_grad for matrix in matrices):
        assert drafters_own == len(rows.tokens_N)


LOSSES = ["ce", "lk_hybrid", "tvdpp", "block_acceptance"]


def joint(*, cached: bool = False) -> tuple[Target, Any, DraftOutput, DraftBatch]:
    """Return Medusa-2 away from its start, with rows of the live target or stored ones."""
    target = Target(random_llama(num_layers=2).double(), byte_tokenizer(), name="tiny", fingerprint="")
    settings = MedusaSettings(num_heads=2, joint=JointSettings(lora=LoraSettings(rank=2, dropout=0.0)))
    torch.manual_seed(1)
    medusa = Medusa.create(settings, target=target, tokenizer=target.tokenizer).double().train()
    for parameter in medusa.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    batch, _ = pack(records(), width=20, weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, medusa.needs())
    rows: Any = CountedRows(target.rows_of(seen)) if cached else target.rows_of(seen)
    batch = replace(batch, target=seen, target_rows=rows)
    return target, medusa, medusa(batch), batch


def loss_called(name: str) -> Loss:
    return losses.build(losses.entry(name).settings())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, 5])
def test_of_medusa_2_the_targets_head_runs_once_a_position_for_its_own_loss_and_that_of_the_heads(
    name, chunk, monkeypatch
):
    asked: list[Tensor] = []
    at = LiveRows.at
    monkeypatch.setattr(LiveRows, "at", lambda self, index_N: asked.append(index_N) or at(self, index_N))
    target, _, drafted, batch = joint()
    loss = loss_called(name)
    rows = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
    with Products([target.model.get_output_embeddings().weight]) as products:
        drafted_loss(loss, drafted, rows, batch, vocab_size=257, chunk_rows=chunk).total.backward()
    positions = align(drafted.beside[0].drafted, batch).target_N
    assert len(positions) > rows.counts[1]
    assert torch.cat(asked).tolist() == positions.tolist()
    # And once with the adapters on.
    assert products.rows == 2 * len(positions)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [None, 5])
def test_of_medusa_2_the_total_is_that_of_both_losses_alone(name, chunk):
    """Values, acceptance and the gradients of heads and adapters; the heads' loss may be of stored rows."""
    found = []
    for together, cached in ((True, False), (True, True), (False, False)):
        _, medusa, drafted, batch = joint(cached=cached)
        loss, (beside,) = loss_called(name), drafted.beside
        rows = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
        if together:
            made = drafted_loss(loss, drafted, rows, batch, vocab_size=257, chunk_rows=chunk)
            total = made.total
        else:
            made = drafted_loss(loss, replace(drafted, beside=()), rows, batch, vocab_size=257)
            own_batch = replace(batch, target_rows=beside.target_rows)
            own = drafted_loss(beside.loss, beside.drafted, align(beside.drafted, batch), own_batch, vocab_size=257)
            assert own.total > 1e-3
            total = made.total + own.total
        total.backward()
        numbers = {"total": total, "rows": made.loss_N}
        if made.acceptance_N is not None:
            numbers["accepted"] = made.acceptance_N
        found.append(numbers | {name: weight.grad for name, weight in medusa.named_parameters()})
    assert all(bool(value.any()) for value in found[2].values())
    for one in found[:2]:
        assert one.keys() == found[2].keys()
        for name, value in one.items():
            torch.testing.assert_close(value, found[2][name], rtol=0, atol=1e-12)


@EVERY_KIND
def test_a_head_that_is_only_a_function_runs_again_but_not_the_targets(kind, settings):
    """As where ZeRO-3 spreads the weights: pieces are computed again in the backward pass, the target's rows are kept."""
    _, _, drafted, batch = made(kind, settings)
    head = drafted.head
    ran = []

    def counting(states_ND: Tensor, depth: int) -> Tensor:
        ran.append(len(states_ND))
        return head(states_ND, depth)

    rows = align(drafted, batch)
    loss = losses.build(losses.entry("lk_hybrid").settings())
    drafted_loss(loss, replace(drafted, head=counting), rows, batch, vocab_size=257, chunk_rows=5).total.backward()
    assert torch.cat(batch.target_rows.asked).tolist() == rows.target_N.unique().tolist()
    assert sum(ran) == 2 * len(rows.tokens_N)


@EVERY_KIND
def test_both_ways_train_the_same(kind, settings):
    """Every kind hands its head over in parts, and as a function it trains to the same gradients."""
    found = []
    for fused in (True, False):
        _, drafter, drafted, batch = made(kind, settings)
        if not fused:
            head = drafted.head
            drafted = replace(drafted, head=lambda states_ND, depth, head=head: head(states_ND, depth))
        loss = losses.build(losses.entry("lk_hybrid").settings())
        chosen = drafted_loss(loss, drafted, align(drafted, batch), batch, vocab_size=257, chunk_rows=7)
        assert chosen.total.grad_fn.name().startswith("_Fused") == fused
        chosen.total.backward()
        found.append({name: weight.grad for name, weight in drafter.named_parameters() if weight.requires_grad})
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=name)
