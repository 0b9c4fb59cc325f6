"""What each loss is, as identities; and what holds for every loss in the registry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.probability import acceptance_rate
from drafttrain.core.target_rows import RowIndex
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.losses import Loss, losses
from drafttrain.losses.align import align
from drafttrain.losses.block_acceptance import BlockAcceptanceSettings
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.d_pace import DPaceSettings
from drafttrain.losses.jsd import JSDSettings
from drafttrain.losses.lk_hybrid import LKHybridSettings
from drafttrain.losses.neg_log_acceptance import NegLogAcceptanceSettings
from drafttrain.losses.step import drafted_loss, share_of_step
from drafttrain.losses.tvdpp import TVDPPSettings
from drafttrain.losses.weighted_sum import Term, WeightedSumSettings

V = 7


def settings_of(name: str) -> Any:
    """Return settings of a loss as a recipe would make them; a sum gets two parts."""
    if name == "sum":
        parts = [
            Term(loss=TVDPPSettings()),
            Term(loss=CrossEntropySettings(), weight=0.5, final_weight=0.1, until_step=4),
        ]
        return WeightedSumSettings(terms=parts)
    return losses.entry(name).settings()


VARIANTS = [(name, settings_of(name)) for name in losses.names()] + [
    ("d_pace-lk_hybrid", DPaceSettings(loss=LKHybridSettings())),
    ("d_pace-acceptance", DPaceSettings(loss=NegLogAcceptanceSettings(), chance="acceptance", smoothing=0.0)),
    *(
        (f"tvdpp-{estimator}-{scope}", TVDPPSettings(estimator=estimator, scope=scope, num_samples=4))
        for estimator in ("exact", "sampled")
        for scope in ("position", "sequence", "batch")
    ),
]
EVERY = pytest.mark.parametrize("settings", [s for _, s in VARIANTS], ids=[name for name, _ in VARIANTS])


def rows(*, count: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> LossRows:
    generator = torch.Generator().manual_seed(seed)
    drafter = torch.randn(count, V, generator=generator, dtype=dtype, requires_grad=True)
    target = 2 * torch.randn(count, V, generator=generator, dtype=dtype)
    return LossRows(
        drafter,
        target,
        torch.arange(count) % V,
        seed_N=torch.arange(count) * 64 + 1,
        confidence_N=drafter[:, 0] - drafter[:, 1],
    )


def index(count: int = 5, step: int = 0) -> RowIndex:
    zeros = torch.zeros(count, dtype=torch.long)
    return RowIndex(zeros, zeros + 1, torch.arange(count), step=step)


def value(name: str, given: LossRows, **settings: Any) -> Tensor:
    loss: Loss = losses.build(losses.entry(name).settings(**settings))
    return loss.combine(loss.per_row(given), index(len(given.tokens_N)))


def gradient(loss_N: Tensor, given: LossRows) -> Tensor:
    return torch.autograd.grad(loss_N.sum(), given.drafter_logits_NV, retain_graph=True)[0]


def test_tvd_is_one_minus_acceptance():
    given = rows()
    p, q = (logits.softmax(-1) for logits in (given.target_logits_NV, given.drafter_logits_NV))
    torch.testing.assert_close(value("tvd", given), 0.5 * (p - q).abs().sum(-1))
    torch.testing.assert_close(1 - acceptance_rate(p, q), 0.5 * (p - q).abs().sum(-1), rtol=0, atol=1e-12)


def test_gradient_of_tvd_is_a_policy_gradient():
    given = rows()
    loss = losses.build(losses.entry("tvd").settings())
    grad_tvd = gradient(loss.per_row(given)["loss"], given)
    p, q = (logits.softmax(-1) for logits in (given.target_logits_NV, given.drafter_logits_NV))
    reward = (p > q).to(q.dtype)
    policy = -(q.detach() * reward * q.log()).sum(-1)
    torch.testing.assert_close(grad_tvd, gradient(policy, given), rtol=0, atol=1e-12)
    wrong = -(q.detach() * (1 - reward) * q.log()).sum(-1)
    assert not torch.allclose(grad_tvd, gradient(wrong, given), atol=1e-3)


@pytest.mark.parametrize("scope", ["position", "sequence", "batch"])
def test_gradient_of_exact_tvdpp_is_that_of_tvd_over_sigma(scope):
    given = rows()
    loss = losses.build(TVDPPSettings(scope=scope, eps=1e-300))
    with torch.no_grad():
        loss.previous_mean.fill_(0.3)
    p, q = (logits.softmax(-1) for logits in (given.target_logits_NV, given.drafter_logits_NV))
    reward_N = (q * (p > q)).sum(-1).detach()
    mean_N = {
        "position": reward_N,
        "sequence": reward_N.mean().expand(5),
        "batch": torch.tensor(0.3).double().expand(5),
    }[scope]
    sigma_N1 = (mean_N * (1 - mean_N)).sqrt()[:, None]
    ours = gradient(loss.combine(loss.per_row(given), index()), given)
    tvd = losses.build(losses.entry("tvd").settings())
    tolerance = 1e-7 if scope == "batch" else 1e-12  # the carried mean is float32
    torch.testing.assert_close(
        ours, gradient(tvd.per_row(given)["loss"], given) / sigma_N1, rtol=tolerance, atol=tolerance
    )


def test_sampled_tvdpp_is_unbiased_and_less_noisy_than_the_raw_reward():
    given = rows(count=1)
    exact = losses.build(TVDPPSettings(scope="batch", eps=1e-12))
    wanted = gradient(exact.combine(exact.per_row(given), index(1)), given)
    many = 40_000
    drafter = given.drafter_logits_NV.detach().repeat(many, 1).requires_grad_(True)
    wide = LossRows(
        drafter, given.target_logits_NV.repeat(many, 1), torch.zeros(many, dtype=torch.long), torch.arange(many)
    )
    sampled = losses.build(TVDPPSettings(estimator="sampled", scope="batch", eps=1e-12))
    per_sample = torch.autograd.grad(
        sampled.combine(sampled.per_row(wide), index(many)).sum(), drafter, retain_graph=True
    )[0]
    error = per_sample.std(0) / math.sqrt(many)
    assert ((per_sample.mean(0) - wanted[0]).abs() < 4.5 * error + 1e-12).all()
    raw = torch.autograd.grad(2 * sampled.per_row(wide)["rewarded"].sum(), drafter)[0]  # sigma = 0.5, mu = 0
    assert per_sample.var(0).sum() < raw.var(0).sum()


def test_pinsker_bounds_tvd_by_both_directions_of_kl():
    given = rows(count=50)
    tvd = value("tvd", given)
    for name in ("forward_kl", "reverse_kl"):
        assert (tvd <= (value(name, given) / 2).sqrt() + 1e-6).all()


def test_jsd_ends_in_the_two_kls_and_is_at_most_log_two():
    given = rows()
    small = losses.build(JSDSettings(beta=1e-5)).per_row(given)["loss"] / 1e-5
    torch.testing.assert_close(small, value("forward_kl", given), rtol=1e-3, atol=1e-6)
    large = losses.build(JSDSettings(beta=1 - 1e-5)).per_row(given)["loss"] / 1e-5
    torch.testing.assert_close(large, value("reverse_kl", given), rtol=1e-3, atol=1e-6)
    assert (value("jsd", given) <= math.log(2) + 1e-6).all()


def test_class_weighting_moves_the_optimum_away_from_the_probability():
    """A head trained with weight w on rejections answers a / (a + w (1 - a)), not a."""
    a, w = 0.5, 6.0
    x = torch.linspace(0.001, 0.999, 9999, dtype=torch.float64)
    best = x[(-(a * x.log() + w * (1 - a) * (1 - x).log())).argmin()]
    assert float(best) == pytest.approx(a / (a + w * (1 - a)), abs=1e-3)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "neg_log_acceptance", "lk_hybrid"])
def test_equal_distributions_have_no_loss(name):
    given = rows()
    same = LossRows(
        given.target_logits_NV.clone().requires_grad_(True), given.target_logits_NV, given.tokens_N, given.seed_N
    )
    loss_N = value(name, same)
    assert loss_N.abs().max() < 1e-6
    if name not in ("tvd", "neg_log_acceptance", "lk_hybrid"):
        assert gradient(loss_N, same).abs().max() < 1e-6


def test_losses_stay_finite_where_distributions_do_not_overlap():
    given = rows(dtype=torch.float32)
    far = torch.full((5, V), -60.0)
    far[:, 0] = 60
    other = torch.full((5, V), -60.0)
    other[:, 1] = 60
    apart = LossRows(far.requires_grad_(True), other, given.tokens_N, given.seed_N)
    for name in ("forward_kl", "reverse_kl", "jsd", "tvd", "tvdpp", "neg_log_acceptance", "lk_hybrid", "ce"):
        loss_N = value(name, apart)
        assert torch.isfinite(loss_N).all(), name
        assert torch.isfinite(gradient(loss_N, apart)).all(), name


def test_block_acceptance_is_the_expected_length_and_its_gradient_the_products():
    given = rows(count=3)
    loss = losses.build(losses.entry("block_acceptance").settings(block_length=3))
    block = RowIndex(torch.zeros(3, dtype=torch.long), torch.arange(1, 4), torch.zeros(3, dtype=torch.long))
    a = loss.per_row(given)["acceptance"]
    expected = 1 - (a[0] + a[0] * a[1] + a[0] * a[1] * a[2]) / 3
    torch.testing.assert_close(loss.combine({"acceptance": a}, block), expected.expand(3))
    order = torch.tensor([2, 0, 1])
    shuffled = RowIndex(block.sequence_N, block.depth_N[order], block.block_N)
    torch.testing.assert_close(loss.combine({"acceptance": a[order]}, shuffled), expected.expand(3))


def test_the_confidence_is_trained_towards_the_acceptance_rate_which_has_no_gradient():
    given = rows(count=4)
    score_N = torch.tensor([-1.0, 0.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    with_score = LossRows(given.drafter_logits_NV, given.target_logits_NV, given.tokens_N, confidence_N=score_N)
    loss_N = value("confidence", with_score)
    c_N, a_N = score_N.sigmoid(), given.acceptance_N.detach()
    torch.testing.assert_close(loss_N, -a_N * c_N.log() - (1 - a_N) * (1 - c_N).log(), rtol=1e-12, atol=0)
    (of_score_N,) = torch.autograd.grad(loss_N.sum(), score_N)
    torch.testing.assert_close(of_score_N, c_N - a_N, rtol=0, atol=1e-12)
    assert not loss_N.grad_fn or all(
        found is None
        for found in torch.autograd.grad(
            value("confidence", with_score).sum(), given.drafter_logits_NV, allow_unused=True
        )
    )
    # The control: with a live acceptance rate the drafter would be trained to be predictable.
    live_N = -given.acceptance_N * c_N.log() - (1 - given.acceptance_N) * (1 - c_N).log()
    assert gradient(live_N, given).abs().max() > 1e-2
    with pytest.raises(CheckpointError, match="this drafter has none"):
        value("confidence", LossRows(given.drafter_logits_NV, given.target_logits_NV, given.tokens_N))


def test_a_sum_cuts_its_blocks_once():
    def blocks(*lengths: int) -> WeightedSumSettings:
        return WeightedSumSettings(terms=[Term(loss=BlockAcceptanceSettings(block_length=n)) for n in lengths])

    assert blocks(3, 3).check() == []
    assert blocks(5, 3).check() == ["terms: block_length must be the same in all terms, got [3, 5]"]
    assert WeightedSumSettings(terms=[*blocks(3).terms, Term(loss=blocks(4))]).check() != []


def test_a_weight_waits_for_its_first_step():
    """From `from_step` to `until_step` linearly; equal: at once."""

    def at(term: Term, *steps: int) -> list[float]:
        assert term.check() == []
        return [term.at(step) for step in steps]

    ce = CrossEntropySettings()
    moves = Term(loss=ce, weight=1.0, final_weight=0.0, from_step=10, until_step=20)
    assert at(moves, 0, 9, 10, 15, 20, 99) == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    jumps = Term(loss=ce, weight=0.0, final_weight=2.0, from_step=10, until_step=10)
    assert at(jumps, 0, 9, 10, 11) == [0.0, 0.0, 2.0, 2.0]
    assert Term(loss=ce, final_weight=0.0, from_step=5, until_step=4).check() == [
        "from_step: at most until_step 4, got 5"
    ]
    assert Term(loss=ce, from_step=5).check() == ["from_step: is not used without final_weight"]


def test_weights_of_a_sum_follow_their_schedule():
    given = rows()
    loss = losses.build(settings_of("sum"))
    tvdpp, ce = value("tvdpp", given), value("ce", given)
    for step, weight in ((0, 0.5), (2, 0.3), (4, 0.1), (9, 0.1)):
        torch.testing.assert_close(loss.combine(loss.per_row(given), index(step=step)), tvdpp + weight * ce)


# ---------------------------------------------------------------- every loss: independent of how a step is laid out


class Toy(torch.nn.Module):
    """A drafter of one table, so that its rows do not depend on how records are packed."""

    def __init__(self, vocabulary: Tensor | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        generator = torch.Generator().manual_seed(3)
        self.table_VD = torch.nn.Parameter(torch.randn(V, 4, generator=generator, dtype=torch.float64))
        self.head_DV = torch.nn.Parameter(torch.randn(4, V, generator=generator, dtype=torch.float64))

    def forward(self, batch: DraftBatch) -> DraftOutput:
        states_BTD = self.table_VD[batch.tokens_BT]
        return DraftOutput(
            {1: states_BTD},
            self.split_head,
            lag=0,
            vocabulary=self.vocabulary,
            confidence_BT={1: states_BTD.sum(dim=-1)},
        )

    @property
    def split_head(self) -> Any:
        return self.head

    def head(self, states_ND: Tensor, depth: int) -> Tensor:
        head_DR = self.head_DV if self.vocabulary is None else self.head_DV[:, self.vocabulary]
        return states_ND @ head_DR


class ToyOfParts(Toy):
    """The same drafter, whose head is handed over in its parts."""

    def __init__(self, vocabulary: Tensor | None = None) -> None:
        super().__init__(vocabulary)
        head_DR = self.head_DV if vocabulary is None else self.head_DV[:, vocabulary]
        self.linear = torch.nn.Linear(4, head_DR.shape[1], bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(head_DR.t())

    @property
    def split_head(self) -> Any:
        return LinearHead(lambda _: self.linear)


class ToyTarget:
    """The target's distribution by the previous token."""

    def __init__(self, batch: DraftBatch) -> None:
        generator = torch.Generator().manual_seed(4)
        self.rows_NV = 2 * torch.randn(V, V, generator=generator, dtype=torch.float64)[batch.tokens_BT.flatten()]

    def at(self, index_N: Tensor) -> Tensor:
        return self.rows_NV[index_N]


class FloatTarget:
    """Rows of logits in float32."""

    def __init__(self, rows_NV: Tensor) -> None:
        self.rows_NV = rows_NV.float()

    def at(self, index_N: Tensor) -> Tensor:
        return self.rows_NV[index_N]


def records() -> list[Record]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for i, length in enumerate((9, 4, 12, 7, 5, 3)):
        tokens = torch.randint(V, (length,), generator=generator).tolist()
        made.append(Record(str(i), tokens, [False] * (i % 3) + [True] * (length - i % 3)))
    return made


def step_gradient(
    settings: Any,
    *,
    sizes: list[int],
    width: int = 12,
    extra: int = 0,
    chunk: int | None = None,
    roll: int = 2,
    vocabulary: Tensor | None = None,
    normalise: Any = share_of_step,
    toy: type[Toy] = Toy,
) -> Tensor:
    """Return the gradient of the last of `roll` optimizer steps that are laid out in micro-batches of these sizes."""
    from dataclasses import replace

    drafter, loss = toy(vocabulary), losses.build(settings)
    weight = float(sum(sum(record.loss_mask[1:]) for record in records()))
    for step in range(roll):
        drafter.zero_grad()
        first = 0
        for size in sizes:
            members = records()[first : first + size]
            batch, _ = pack(members, width=width, weight_of_step=weight, step=step, first_document=first)
            if extra:
                grown = {
                    name: torch.nn.functional.pad(getattr(batch, name), (0, extra), value=fill)
                    for name, fill in (("tokens_BT", 1), ("loss_mask_BT", 0), ("positions_BT", 0), ("documents_BT", -1))
                }
                batch = replace(batch, **grown)
            batch = replace(batch, target_rows=ToyTarget(batch))
            drafted = drafter(batch)
            aligned = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
            total = drafted_loss(loss, drafted, aligned, batch, vocab_size=V, chunk_rows=chunk).total
            normalise(total, batch, world_size=1, accumulation=1).backward()
            first += size
        loss.end_of_step()
    assert drafter.table_VD.grad is not None
    return drafter.table_VD.grad


@EVERY
def test_a_step_does_not_depend_on_padding_packing_micro_batches_or_chunks(settings):
    whole = step_gradient(settings, sizes=[6])
    assert whole.abs().max() > 0
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(step_gradient(settings, sizes=[6], extra=9), whole, **close)
    torch.testing.assert_close(step_gradient(settings, sizes=[6], width=40), whole, **close)
    torch.testing.assert_close(step_gradient(settings, sizes=[2, 4]), whole, **close)
    torch.testing.assert_close(step_gradient(settings, sizes=[1] * 6), whole, **close)
    torch.testing.assert_close(step_gradient(settings, sizes=[6], chunk=3), whole, **close)
    # Fused, each piece alone: what a loss carries from step to step is gathered over pieces too.
    for layout in ({"sizes": [6]}, {"sizes": [2, 4], "chunk": 3}):
        torch.testing.assert_close(step_gradient(settings, toy=ToyOfParts, **layout), whole, **close)


@EVERY
def test_losses_are_computed_in_float32_whatever_autocast_does(settings):
    """The same logits give the same losses under bf16-mixed: products of probabilities are not summed in bfloat16."""
    from dataclasses import replace

    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=FloatTarget(ToyTarget(batch).rows_NV))
    logits_BTV = (
        3 * torch.randn(*batch.tokens_BT.shape, V, generator=torch.Generator().manual_seed(6))
    ).requires_grad_()
    scores = {1: logits_BTV.mean(dim=-1)}
    drafted = DraftOutput({1: logits_BTV}, lambda states_ND, _: states_ND, lag=0, confidence_BT=scores)
    made = []
    for mixed in (False, True):
        loss = losses.build(settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            aligned = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
            loss_N, _ = row_losses(loss, drafted, aligned, batch, vocab_size=V)
        assert loss_N.dtype == torch.float32
        made.append((loss_N.detach(), torch.autograd.grad(loss_N.sum(), logits_BTV, retain_graph=True)[0]))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


def test_control_a_sigma_of_the_micro_batch_depends_on_the_layout():
    """The same test must fail for a loss that normalises by what happens to be in its micro-batch."""
    from drafttrain.losses.tvdpp import TVDPP

    class PerMicroBatch(TVDPP):
        def _mean(self, reward_N: Tensor, index: RowIndex) -> Tensor:
            return reward_N.mean().expand_as(reward_N)

    def gradient_of(sizes: list[int]) -> Tensor:
        original = losses.entry("tvdpp").component
        losses._entries["tvdpp"] = type(losses.entry("tvdpp"))("tvdpp", PerMicroBatch, TVDPPSettings)
        try:
            return step_gradient(TVDPPSettings(), sizes=sizes)
        finally:
            losses._entries["tvdpp"] = type(losses.entry("tvdpp"))("tvdpp", original, TVDPPSettings)

    assert not torch.allclose(gradient_of([6]), gradient_of([2, 4]), rtol=1e-3)


def test_no_logits_tensor_of_all_rows_exists_when_chunked():
    largest = 0
    drafter = Toy()
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    from dataclasses import replace

    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted = drafter(batch)

    def head(states_ND: Tensor, depth: int) -> Tensor:
        nonlocal largest
        largest = max(largest, len(states_ND))
        return states_ND @ drafter.head_DV

    watched = DraftOutput(drafted.states_BTD, head, lag=0)
    loss = losses.build(losses.entry("forward_kl").settings())
    row_losses(loss, watched, align(watched, batch), batch, vocab_size=V, chunk_rows=4)[0].sum().backward()
    assert largest == 4


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("depths", [[1], [1, 2, 3]])
def test_align_is_a_copy_task(lag, depths):
    """A drafter whose row t already says token t + d + lag is right everywhere; shifted by one it is not."""
    batch, _ = pack(records(), width=16, weight_of_step=1.0)
    for error in (0, 1, -1):
        states = {
            d: torch.nn.functional.one_hot(batch.tokens_BT.roll(-(d + lag + error), dims=1), V).double() * 50
            for d in depths
        }
        drafted = DraftOutput(states, lambda states_ND, depth: states_ND, lag=lag)
        aligned = align(drafted, batch)
        loss_N, _ = row_losses(losses.build(CrossEntropySettings()), drafted, aligned, batch, vocab_size=V)
        expected = sum(sum(r.loss_mask[d + lag :]) for r in records() for d in depths)
        assert len(loss_N) == expected
        assert (loss_N.max() < 1e-6) == (error == 0)
    same = batch.documents_BT.flatten()[aligned.drafter_N] == batch.documents_BT.flatten()[aligned.target_N + 1]
    assert same.all()


def test_padding_ids_have_no_mass():
    """A drafter head with more rows than the tokenizer has ids loses nothing to them."""
    drafter = Toy()
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    from dataclasses import replace

    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted = drafter(batch)
    padded = DraftOutput(
        drafted.states_BTD,
        lambda s, d: torch.cat([s @ drafter.head_DV, torch.full((len(s), 5), 30.0, dtype=s.dtype)], dim=1),
        lag=0,
    )
    for name in ("tvdpp", "forward_kl", "ce"):
        loss = losses.build(losses.entry(name).settings())
        first, _ = row_losses(loss, drafted, align(drafted, batch), batch, vocab_size=V)
        second, _ = row_losses(loss, padded, align(padded, batch), batch, vocab_size=V)
        torch.testing.assert_close(first, second)


def test_label_smoothing_is_torchs_value_and_gradient():
    torch.manual_seed(0)
    logits_NV = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    tokens_N = torch.randint(9, (6,))
    rows = LossRows(logits_NV, None, tokens_N)
    own_N = CrossEntropy(CrossEntropySettings(smoothing=0.1)).per_row(rows)["loss"]
    (own,) = torch.autograd.grad(own_N.sum(), logits_NV)
    wanted_N = torch.nn.functional.cross_entropy(logits_NV, tokens_N, reduction="none", label_smoothing=0.1)
    (wanted,) = torch.autograd.grad(wanted_N.sum(), logits_NV)
    torch.testing.assert_close(own_N, wanted_N)
    torch.testing.assert_close(own, wanted)
    # Control: without smoothing it is another loss.
    assert float((CrossEntropy().per_row(LossRows(logits_NV, None, tokens_N))["loss"] - wanted_N).detach().norm()) > 0.1
