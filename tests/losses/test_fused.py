"""Fused losses: the gradient that is taken on the way forward is that of the plain formula, and nothing wide is kept for it."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.piece_size import PieceSize
from drafttrain.data_gen.packing import pack
from drafttrain.losses import Loss, losses, pieces
from drafttrain.losses.align import align
from drafttrain.losses.block_acceptance import BlockAcceptanceSettings
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.confidence import ConfidenceSettings
from drafttrain.losses.head_products import JoinedGradients, RowGradients
from drafttrain.losses.step import drafted_loss
from drafttrain.losses.tvd import TVDSettings
from drafttrain.losses.weighted_sum import Term, WeightedSumSettings
from drafttrain.target_model.logits import head_logits, head_of
from tests.conftest import random_llama
from tests.losses.test_losses import EVERY, FloatTarget, ToyTarget, V, index, records, rows
from tests.marks import long

SOME = torch.tensor([0, 2, 3, 6])
WIDTH = 4


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.minimum(log_p, log_q).exp().sum(-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.log(0.5 * log_p.exp() + 0.5 * log_q.exp())
    return 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)


def hybrid(log_p: Tensor, log_q: Tensor) -> Tensor:
    share = (-3.0 * overlap(log_p, log_q).detach()).exp()
    return share * kl(log_p, log_q) + (1 - share) * (1 - overlap(log_p, log_q))


def tvdpp(log_p: Tensor, log_q: Tensor) -> Tensor:
    q = log_q.detach().exp()
    reward = (log_p > log_q.detach()).double()
    mean = (q * reward).sum(-1).mean()
    advantage = (reward - mean) / ((mean * (1 - mean)).sqrt() + 1e-6)
    return -(q * advantage * log_q).sum(-1)


def confidence(log_p: Tensor, log_q: Tensor) -> Tensor:
    predicted = (log_q[:, 0] - log_q[:, 1]).sigmoid()
    rate = overlap(log_p, log_q).detach()
    return -rate * predicted.log() - (1 - rate) * (1 - predicted).log()


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "tvd": lambda log_p, log_q: 1 - overlap(log_p, log_q),
    "block_acceptance": lambda log_p, log_q: 1 - overlap(log_p, log_q),  # blocks of one row
    "neg_log_acceptance": lambda log_p, log_q: -overlap(log_p, log_q).log(),
    "lk_hybrid": hybrid,
    "tvdpp": tvdpp,
    "confidence": confidence,
}


def test_every_loss_of_the_target_has_a_plain_formula_here():
    parts = {name: losses.entry(name).component for name in losses.names()}
    # A loss that holds others needs a target if they do.
    own = {
        name for name, part in parts.items() if part.needs_target is True and part.__module__.startswith("drafttrain.")
    }
    assert own == set(PLAIN)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("equal", [False, True])
def test_values_and_gradients_are_those_of_autograd_on_the_plain_formula(name, equal):
    given = rows(count=9)
    if equal:  # the first rows meet the target exactly, where a minimum has two answers
        with torch.no_grad():
            given.drafter_logits_NV[:4] = given.target_logits_NV[:4]
        given = replace(given, confidence_N=given.drafter_logits_NV[:, 0] - given.drafter_logits_NV[:, 1])
    if equal and name == "tvdpp":
        pytest.skip("its reward is p > q, which rounding decides where both are equal")
    loss = losses.build(losses.entry(name).settings())
    ours = loss.combine(loss.per_row(given), index(9))
    plain = PLAIN[name](given.target_logits_NV.log_softmax(-1), given.drafter_logits_NV.log_softmax(-1))
    weight = torch.arange(1, 10).double()
    (one,) = torch.autograd.grad((weight * ours).sum(), given.drafter_logits_NV)
    (other,) = torch.autograd.grad((weight * plain).sum(), given.drafter_logits_NV)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_tokens_without_mass_in_the_target_add_nothing():
    given = rows()
    none = given.target_logits_NV.clone()
    none[:, 2] = -torch.inf
    for name in ("forward_kl", "jsd", "tvd", "tvdpp", "neg_log_acceptance", "lk_hybrid"):
        cut = LossRows(given.drafter_logits_NV, none, given.tokens_N, given.seed_N)
        loss = losses.build(losses.entry(name).settings())
        loss_N = loss.combine(loss.per_row(cut), index())
        assert torch.isfinite(loss_N).all(), name
        assert torch.isfinite(torch.autograd.grad(loss_N.sum(), given.drafter_logits_NV)[0]).all(), name


def test_a_row_is_free_once_its_loss_is():
    """A slope that held its rows would hold them in a circle, and every piece's wide tensors with them."""
    gc.disable()
    try:
        for name in PLAIN:
            given = rows()
            made = losses.build(losses.entry(name).settings()).per_row(given)
            gone = weakref.ref(given)
            del given, made
            assert gone() is None, name
    finally:
        gc.enable()


class Model(nn.Module):
    """A drafter of tables: three depths, a norm before the output matrix, a bias, a soft cap behind it."""

    def __init__(
        self, *, vocabulary: Tensor | None, dtype: torch.dtype = torch.float64, depths: int = 3, added: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.vocabulary = vocabulary
        columns = V + 2 if vocabulary is None else len(vocabulary)  # two ids of padding
        self.tables = nn.ParameterList(torch.randn(V, WIDTH) for _ in range(depths))
        self.norm = nn.RMSNorm(WIDTH)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, columns) for _ in range(2))
        self.predicts = nn.Linear(WIDTH, 1)
        self.added = nn.Linear(2, columns, bias=False) if added else None
        self.to(dtype)

    def linear(self, depth: int) -> nn.Module:
        return self.linears[depth % 2]

    def forward(self, batch: DraftBatch) -> DraftOutput:
        states = {depth: table[batch.tokens_BT] for depth, table in enumerate(self.tables, start=1)}
        scores = {depth: self.predicts(state)[..., 0] for depth, state in states.items()}
        if self.added is not None:
            states = {depth: torch.cat([state, state[..., 1:3].tanh()], dim=-1) for depth, state in states.items()}
        return DraftOutput(
            states,
            LinearHead(self.linear, before=self.norm, after=self.after, added=self.added),
            lag=1,
            depth_weights={1: 1.0, 2: 0.5, 3: 0.25},
            vocabulary=self.vocabulary,
            confidence_BT=scores,
        )

    @staticmethod
    def after(logits: Tensor) -> Tensor:
        return 3 * torch.tanh(2 * logits / 3)


def gradients(
    settings: Any,
    *,
    fused: bool,
    vocabulary: Tensor | None,
    chunk: int | None = None,
    mixed: bool = False,
    frozen: bool = False,
    **model: Any,
) -> dict[str, Tensor]:
    """Return the loss of a batch and the gradients of all weights."""
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    toy = ToyTarget(batch)
    batch = replace(batch, target_rows=FloatTarget(toy.rows_NV) if mixed else toy)
    drafter, loss = Model(vocabulary=vocabulary, **model), losses.build(settings)
    drafter.linears.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        drafted = drafter(batch)
        if not fused:
            head = drafted.head
            drafted = replace(drafted, head=lambda states_ND, depth: head(states_ND, depth))
        aligned = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
        made = drafted_loss(loss, drafted, aligned, batch, vocab_size=V, chunk_rows=chunk)
    (2 * made.total).backward()
    found = {name: weight.grad for name, weight in drafter.named_parameters()}
    return found | {"total": made.total.detach(), "loss_N": made.loss_N, "acceptance_N": made.acceptance_N}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    for name, value in one.items():
        assert (value is None) == (other[name] is None), name
        if value is not None:
            torch.testing.assert_close(value, other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@EVERY
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("vocabulary", [None, SOME], ids=["whole", "some"])
def test_fused_losses_are_the_plain_ones(settings, vocabulary, frozen):
    """Of every loss: total, rows, acceptance, and the gradients of states, matrices, biases and the norm, in any pieces."""
    if settings.kind == "confidence":
        pytest.skip("it trains no logits; the sum of the paper, below, contains it")
    given = {"vocabulary": vocabulary, "frozen": frozen}
    plain = gradients(settings, fused=False, **given)
    assert plain["norm.weight"].abs().max() > 0
    assert (plain["linears.0.weight"] is None) == frozen
    for chunk in (None, 3):
        assert_same(gradients(settings, fused=True, chunk=chunk, **given), plain, rtol=1e-9, atol=1e-11)


@EVERY
@pytest.mark.parametrize("model", [{}, {"added": True}], ids=["one matrix", "two"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_bands_of_a_piece_change_nothing(settings, frozen, model, monkeypatch):
    """A piece is multiplied at once and read a few rows at a time: values, acceptance and every gradient."""
    given = {"vocabulary": None, "frozen": frozen, **model}
    whole = gradients(settings, fused=True, **given)
    monkeypatch.setattr(pieces, "BAND_BYTES", PieceSize(on_cpu=4 * V * 2, elsewhere=1))
    assert len(pieces.bands(torch.empty(5, V))) == 3
    assert_same(gradients(settings, fused=True, **given), whole, rtol=1e-9, atol=1e-11)


def test_control_a_band_that_writes_to_its_neighbours_rows_is_seen(monkeypatch):
    whole = gradients(TVDSettings(), fused=True, vocabulary=None)
    monkeypatch.setattr(pieces, "BAND_BYTES", PieceSize(on_cpu=4 * V * 2, elsewhere=1))
    add = JoinedGradients.add
    monkeypatch.setattr(JoinedGradients, "add", lambda self, rows, found: add(self, shifted(rows), found))
    with pytest.raises(AssertionError, match=r"tables|linears|norm"):
        assert_same(gradients(TVDSettings(), fused=True, vocabulary=None), whole, rtol=1e-9, atol=1e-11)


def shifted(rows: slice) -> slice:
    """Return the span one band earlier, where there is one."""
    size = rows.stop - rows.start
    return rows if rows.start < size else slice(rows.start - size, rows.start)


PAPER = WeightedSumSettings(
    terms=[
        Term(loss=CrossEntropySettings(), weight=0.1),
        Term(loss=TVDSettings(), weight=1.8),
        Term(loss=ConfidenceSettings()),
    ]
)


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("settings", [PAPER, BlockAcceptanceSettings()], ids=["paper", "block"])
def test_a_second_matrix_adds_to_the_logits_after_the_cap(settings, frozen, capped, monkeypatch):
    """As a Markov head adds its bias: values, and the gradients of both matrices, of states and of the prediction."""
    if not capped:
        monkeypatch.setattr(Model, "after", None)
    given = {"vocabulary": None, "frozen": frozen, "added": True}
    plain = gradients(settings, fused=False, **given)
    assert plain["added.weight"].abs().max() > 0
    for chunk in (None, 3):
        assert_same(gradients(settings, fused=True, chunk=chunk, **given), plain, rtol=1e-9, atol=1e-11)
    model = Model(vocabulary=None, added=True)
    state_14 = torch.randn(1, WIDTH, dtype=torch.float64)
    extra_12 = torch.randn(1, 2, dtype=torch.float64)
    head = model(pack(records(), width=12, weight_of_step=1.0)[0]).head
    own = model.linear(1)(model.norm(state_14))
    wanted = (Model.after(own) if capped else own) + extra_12 @ model.added.weight.t()
    torch.testing.assert_close(head(torch.cat([state_14, extra_12], dim=1), 1), wanted)


@pytest.mark.parametrize("kind", ["block_acceptance", "d_pace", "tvdpp"])
def test_control_a_gradient_through_a_frozen_head_without_the_factors_of_its_rows_is_seen(kind, monkeypatch):
    from drafttrain.losses import fused

    settings = losses.entry(kind).settings()
    plain = gradients(settings, fused=False, vocabulary=None, frozen=True)
    original = fused._Work.combine

    def forgetful(self: Any) -> None:
        held, self._unscaled = self._unscaled, []
        original(self)
        self._unscaled = held
        for _, entering, gradients in held:
            self._products.pull_rows(entering, reduce(RowGradients.plus, gradients.values()))

    monkeypatch.setattr(fused._Work, "combine", forgetful)
    with pytest.raises(AssertionError):
        assert_same(gradients(settings, fused=True, vocabulary=None, frozen=True), plain, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["lk_hybrid", "tvdpp"])
def test_control_a_gradient_that_is_not_weighted_by_depth_is_seen(kind, monkeypatch):
    from drafttrain.losses import fused

    settings = losses.entry(kind).settings()
    plain = gradients(settings, fused=False, vocabulary=SOME)
    original = fused._Work.__init__

    def forgetful(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.factors = dict.fromkeys(self.factors, 1.0)

    monkeypatch.setattr(fused._Work, "__init__", forgetful)
    with pytest.raises(AssertionError):
        assert_same(gradients(settings, fused=True, vocabulary=SOME), plain, rtol=1e-2, atol=1e-3)


@EVERY
def test_under_autocast_fused_losses_multiply_in_bfloat16_as_plain_ones_do(settings):
    """The same logits, so the same losses; gradients that are added up in float32 differ by bfloat16's rounding."""
    plain = gradients(settings, fused=False, vocabulary=SOME, mixed=True, dtype=torch.float32)
    fused = gradients(settings, fused=True, vocabulary=SOME, mixed=True, dtype=torch.float32)
    torch.testing.assert_close(fused["loss_N"], plain["loss_N"])
    for name, value in fused.items():
        if value is not None and plain[name] is not None:
            assert value.dtype == torch.float32
            assert (value - plain[name]).norm() <= 0.04 * plain[name].norm(), name


class Seeing(Loss):
    """Cross-entropy that remembers the logits it was given."""

    needs_target = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def per_row(self, rows: LossRows) -> dict[str, Tensor]:
        self.seen.append(rows.drafter_logits_NV.detach())
        return {"loss": nn.functional.cross_entropy(rows.drafter_logits_NV.float(), rows.tokens_N, reduction="none")}


def through_a_targets_head(function: Any, *, trained: bool, mixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits that a loss sees, those that the target itself makes, and the gradient of the states."""
    model = random_llama()
    model.config.final_logit_softcapping = 2.0
    model.requires_grad_(trained)
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    generator = torch.Generator().manual_seed(3)
    width = model.config.hidden_size
    states_BTD = torch.randn(*batch.tokens_BT.shape, width, generator=generator, requires_grad=True)
    drafted = DraftOutput({1: states_BTD}, head_of(model), lag=1)
    aligned, loss = align(drafted, batch), Seeing()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        made = function(loss, drafted, aligned, batch, vocab_size=model.config.vocab_size)
    (made.total if function is drafted_loss else made[0].sum()).backward()
    assert states_BTD.grad is not None
    own_NV = head_logits(model, states_BTD.detach().flatten(0, 1)[aligned.drafter_N])
    return torch.cat(loss.seen), own_NV, states_BTD.grad


@pytest.mark.parametrize("function", [drafted_loss, row_losses])
def test_a_frozen_head_stays_in_its_own_type_under_autocast_bit_for_bit(function):
    """What a drafter is trained through is the head that validates and decodes."""
    seen_NV, own_NV, gradient_BTD = through_a_targets_head(function, trained=False, mixed=True)
    assert seen_NV.dtype == torch.float32
    assert torch.equal(seen_NV, own_NV)
    assert torch.equal(gradient_BTD, through_a_targets_head(function, trained=False, mixed=False)[2])


@pytest.mark.parametrize("function", [drafted_loss, row_losses])
def test_control_a_trained_head_is_rounded_by_autocast(function):
    seen_NV, own_NV, gradient_BTD = through_a_targets_head(function, trained=True, mixed=True)
    assert seen_NV.dtype == torch.bfloat16
    assert not torch.equal(seen_NV.float(), own_NV)
    assert not torch.equal(gradient_BTD, through_a_targets_head(function, trained=True, mixed=False)[2])


@pytest.mark.parametrize("kind", ["lk_hybrid", "tvdpp", "ce"])
def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass(kind):
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted = Model(vocabulary=None)(batch)
    aligned = align(drafted, batch)

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    for function in (row_losses, drafted_loss):
        packed: list[weakref.ref[Held]] = []

        def pack_held(tensor: Tensor, packed: list[weakref.ref[Held]] = packed) -> Held:
            held = Held(tensor)
            packed.append(weakref.ref(held))
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack_held, lambda held: held.tensor):
            made = function(losses.build(losses.entry(kind).settings()), drafted, aligned, batch, vocab_size=V)
        alive = [tuple(held.tensor.shape) for reference in packed if (held := reference()) is not None]
        wide = [shape for shape in alive if len(shape) == 2 and shape[0] > WIDTH and shape[1] in (V, V + 2)]
        assert bool(wide) == (function is row_losses)
        assert made is not None


def test_a_fused_gradient_is_given_once():
    drafter = Model(vocabulary=None)
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted = drafter(batch)
    loss = losses.build(losses.entry("forward_kl").settings())
    total = drafted_loss(loss, drafted, align(drafted, batch), batch, vocab_size=V).total
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="given once"):
        total.backward()


def test_a_sum_that_is_no_number_makes_every_gradient_none():
    drafter = Model(vocabulary=None)
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted = drafter(batch)
    loss = losses.build(losses.entry("forward_kl").settings())
    total = drafted_loss(loss, drafted, align(drafted, batch), batch, vocab_size=V).total
    (total * math.nan).backward()
    assert all(torch.isnan(weight.grad).any() for weight in drafter.parameters() if weight.grad is not None)


ASKS_THE_DEVICE = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero", "equal", "_unique")
"""Operators whose result, or its size, the host waits for."""


class Asked(TorchDispatchMode):
    """Notes the operators for which a host would wait on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            isinstance(place, Tensor) and place.dtype == torch.bool for place in args[1]
        )
        if name in ASKS_THE_DEVICE or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@EVERY
@pytest.mark.parametrize(
    ("fused", "vocabulary"), [(True, None), long(True, SOME), long(False, None), (False, SOME)], ids=str
)
def test_no_loss_asks_the_device_for_anything(settings, vocabulary, fused):
    """Not for the rows that can be learned, nor for the number of sequences or blocks: their rows are known before."""
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted, loss = Model(vocabulary=vocabulary)(batch), losses.build(settings)
    if not fused:
        head = drafted.head
        drafted = replace(drafted, head=lambda states_ND, depth: head(states_ND, depth))
    aligned = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
    with Asked() as asked:
        drafted_loss(loss, drafted, aligned, batch, vocab_size=V, chunk_rows=5).total.backward()
        loss.end_of_step()
    assert asked.found == []


def test_control_a_mask_and_a_number_are_seen():
    with Asked() as asked:
        numbers = torch.arange(4)
        assert len(numbers[numbers > 1]) == 2
        assert bool((numbers == 3).any())
    assert asked.found == ["index", "is_nonzero"] or asked.found == ["index", "_local_scalar_dense"]
