"""What the weights of D-PACE and the loss of whole blocks are, as identities in float64, each with a variant that fails it.

N = rows, V = vocabulary, K = depths of a block
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.config.load import load_recipe
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss, losses
from drafttrain.losses.block_acceptance import BlockAcceptance, BlockAcceptanceSettings
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.d_pace import DPace, DPaceSettings
from drafttrain.losses.forward_kl import ForwardKLSettings
from drafttrain.losses.lk_hybrid import LKHybridSettings
from drafttrain.losses.neg_log_acceptance import NegLogAcceptanceSettings
from drafttrain.losses.tvdpp import TVDPPSettings

V, K = 7, 5


def rows(blocks: int = 1, *, seed: int = 0) -> LossRows:
    generator = torch.Generator().manual_seed(seed)
    drafter = torch.randn(blocks * K, V, generator=generator, dtype=torch.float64, requires_grad=True)
    target = 2 * torch.randn(blocks * K, V, generator=generator, dtype=torch.float64)
    return LossRows(drafter, target, torch.randint(V, (blocks * K,), generator=generator))


def index(blocks: int = 1, *, learnable: list[bool] | None = None) -> RowIndex:
    """Return the index of whole blocks, one after another."""
    row_N = torch.arange(blocks * K)
    mask_N = None if learnable is None else torch.tensor(learnable)
    return RowIndex(torch.zeros_like(row_N), row_N % K + 1, row_N // K, deepest=K, learnable_N=mask_N)


def weights(chance_N: Tensor, where: RowIndex, *, a: float) -> Tensor:
    """Return the weights of D-PACE: its loss for rows whose own loss is 1."""
    loss = DPace(DPaceSettings(smoothing=a))
    return loss.combine({"loss": torch.ones_like(chance_N), "chance": chance_N}, where)


def by_definition(chances: list[float], *, a: float) -> list[float]:
    """Return w_j = sum_{m=j..K} prod_{i<=m} ((1 - a) c_i + a), with three loops."""
    found = []
    for j in range(len(chances)):
        total = 0.0
        for m in range(j, len(chances)):
            product = 1.0
            for chance in chances[: m + 1]:
                product *= (1 - a) * chance + a
            total += product
        found.append(total)
    return found


def gradient(total: Tensor, given: LossRows) -> Tensor:
    return torch.autograd.grad(total, given.drafter_logits_NV, retain_graph=True)[0]


def of(settings: Any, given: LossRows, where: RowIndex) -> Tensor:
    loss: Loss = losses.build(settings)
    return loss.combine(loss.per_row(given), where)


def expected_length(chance_N: Tensor) -> Tensor:
    """Return the expected accepted length of blocks of K rows, E = sum_m prod_{i<=m} c_i, summed over blocks."""
    return chance_N.view(-1, K).cumprod(dim=1).sum()


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("a", [0.0, 0.3, 0.5, 1.0])
def test_weights_are_those_of_the_definition(a):
    chance_N = torch.rand(3 * K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [w for block in chance_N.view(3, K).tolist() for w in by_definition(block, a=a)]
    found_N = weights(chance_N, index(3), a=a)
    torch.testing.assert_close(found_N, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    for block in found_N.view(3, K).tolist():
        assert all(left > right for left, right in pairwise(block))
    if a == 1:
        assert found_N.tolist() == [5, 4, 3, 2, 1] * 3


def test_weights_do_not_depend_on_the_order_of_rows():
    chance_N = torch.rand(2 * K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    order_N = torch.randperm(2 * K, generator=torch.Generator().manual_seed(3))
    whole = index(2)
    mixed = RowIndex(whole.sequence_N[order_N], whole.depth_N[order_N], whole.block_N[order_N], deepest=K)
    torch.testing.assert_close(
        weights(chance_N[order_N], mixed, a=0.5), weights(chance_N, whole, a=0.5)[order_N], rtol=1e-15, atol=0
    )


def test_no_weight_passes_a_hole():
    """Depth 3 is not trained, cannot be learned, or has a label that the vocabulary lacks: 1 and 2 weigh as a block of two."""
    chance_N = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = torch.tensor([*by_definition(chance_N[:2].tolist(), a=0.5), 0, 0, 0], dtype=torch.float64)
    unlearnable = weights(chance_N, index(learnable=[True, True, False, True, True]), a=0.5)
    torch.testing.assert_close(unlearnable, wanted, rtol=1e-15, atol=0)
    there_N = torch.tensor([0, 1, 3, 4])
    whole = index()
    masked = RowIndex(whole.sequence_N[there_N], whole.depth_N[there_N], whole.block_N[there_N], deepest=K)
    torch.testing.assert_close(weights(chance_N[there_N], masked, a=0.5), wanted[there_N], rtol=1e-15, atol=0)
    given = rows()
    lacking = LossRows(given.drafter_logits_NV, given.target_logits_NV, torch.tensor([1, 2, -1, 4, 5]))
    found = DPace(DPaceSettings(smoothing=0.5)).per_row(lacking)["chance"]
    torch.testing.assert_close(weights(found, index(), a=0.5)[2:], torch.zeros(3, dtype=torch.float64), rtol=0, atol=0)
    # The control: a hole that is jumped, c~ = 1, leaves weight behind it.
    jumped = chance_N.clone()
    jumped[2] = 1
    assert weights(jumped, index(), a=0.5)[3] > 0.1


def test_a_block_begins_at_its_first_depth_that_can_be_learned():
    """As in `block_acceptance`: after a prompt, the first trained depth may be 2."""
    chance_N = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found_N = weights(chance_N, index(learnable=[False, True, True, True, True]), a=0.5)
    wanted = torch.tensor(by_definition(chance_N[1:].tolist(), a=0.5), dtype=torch.float64)
    torch.testing.assert_close(found_N[1:], wanted, rtol=1e-15, atol=0)


# ---------------------------------------------------------------- gradients


def d_pace_gradient(given: LossRows, where: RowIndex, **settings: Any) -> Tensor:
    return gradient(of(DPaceSettings(**settings), given, where).sum(), given)


def test_unsmoothed_its_gradient_is_that_of_minus_the_expected_accepted_length():
    given, where = rows(3), index(3)
    label_N = given.drafter_logits_NV.softmax(-1).gather(1, given.tokens_N[:, None])[:, 0]
    wanted = -gradient(expected_length(label_N), given)
    found = d_pace_gradient(given, where, smoothing=0.0)
    assert wanted.abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)
    # Controls: smoothed, and with the chance taken from the value of another loss as if it were a cross-entropy.
    assert (d_pace_gradient(given, where, smoothing=0.5) - wanted).abs().max() > 1e-2
    tvd_N = of(losses.entry("tvd").settings(), given, where)
    of_value_N = weights((-tvd_N).exp().detach(), where, a=0.0) * of(CrossEntropySettings(), given, where)
    assert (gradient(of_value_N.sum(), given) - wanted).abs().max() > 1e-2


def test_its_weights_have_no_gradient():
    given, where = rows(2), index(2)
    label_N = given.drafter_logits_NV.softmax(-1).gather(1, given.tokens_N[:, None])[:, 0]
    kept_N = weights(label_N.detach(), where, a=0.5)
    wanted = gradient((kept_N * -label_N.log()).sum(), given)
    torch.testing.assert_close(d_pace_gradient(given, where, smoothing=0.5), wanted, rtol=0, atol=1e-15)
    # The control: weights with their gradient.
    smooth_BK = (0.5 * label_N + 0.5).view(2, K)
    live_N = smooth_BK.cumprod(1).flip(1).cumsum(1).flip(1).flatten()
    torch.testing.assert_close(live_N, kept_N)
    assert (gradient((live_N * -label_N.log()).sum(), given) - wanted).abs().max() > 1e-2


def test_with_acceptance_rates_it_is_the_gradient_of_block_acceptance():
    """w_m = K a_m W_m: both weigh depth m by what is accepted before it and what depends on it."""
    given, where = rows(3), index(3)
    wanted = gradient(of(BlockAcceptanceSettings(block_length=K), given, where).sum(), given)
    both = {"loss": NegLogAcceptanceSettings(), "smoothing": 0.0}
    torch.testing.assert_close(d_pace_gradient(given, where, chance="acceptance", **both), wanted, rtol=0, atol=1e-15)
    assert (d_pace_gradient(given, where, **both) - wanted).abs().max() > 1e-2  # the chance of the label
    tvd = {"loss": losses.entry("tvd").settings(), "smoothing": 0.0, "chance": "acceptance"}
    assert (d_pace_gradient(given, where, **tvd) - wanted).abs().max() > 1e-2


# ---------------------------------------------------------------- the loss of whole blocks


def surrogate(acceptance_N: Tensor, *, before: bool = True) -> Tensor:
    """Return sum_m sg[W_m] TV_m, W_m = (1/K) prod_{i<m} a_i S_m, S_m = 1 + a_{m+1} S_{m+1}, S_K = 1."""
    a = acceptance_N.detach().tolist()
    s = [1.0] * K
    for m in reversed(range(K - 1)):
        s[m] = 1 + a[m + 1] * s[m + 1]
    total = torch.zeros((), dtype=torch.float64)
    for m in range(K):
        reached = 1.0
        for chance in a[:m] if before else a[: m + 1]:
            reached *= chance
        total = total + reached * s[m] / K * (1 - acceptance_N[m])
    return total


def test_block_acceptance_has_the_gradient_of_its_detached_surrogate():
    given = rows()
    loss = BlockAcceptance(BlockAcceptanceSettings(block_length=K))
    found = gradient(of(loss.settings, given, index()).sum() / K, given)
    torch.testing.assert_close(found, gradient(surrogate(given.acceptance_N), given), rtol=0, atol=1e-15)
    wrong = gradient(surrogate(given.acceptance_N, before=False), given)
    assert (found - wrong).abs().max() > 1e-3


def test_at_loss_l_the_mean_accepted_length_is_k_times_one_minus_l():
    """Blocks of K draft tokens are drawn and judged 200,000 times."""
    given, many = rows(seed=6), 200_000
    loss = float(of(BlockAcceptanceSettings(block_length=K), given, index())[0].detach())
    p_KV, q_KV = (logits.detach().softmax(-1) for logits in (given.target_logits_NV, given.drafter_logits_NV))
    generator = torch.Generator().manual_seed(7)
    drafts_KM = torch.multinomial(q_KV, many, replacement=True, generator=generator)
    ratio_KM = p_KV.gather(1, drafts_KM) / q_KV.gather(1, drafts_KM)
    accepted_KM = torch.rand(K, many, generator=generator, dtype=torch.float64) < ratio_KM
    length_M = accepted_KM.long().cumprod(dim=0).sum(dim=0).double()
    error = float(length_M.std()) / many**0.5
    assert abs(float(length_M.mean()) - K * (1 - loss)) < 4 * error
    independent = float(1 - of(losses.entry("tvd").settings(), given, index()).detach().mean())
    assert abs(float(length_M.mean()) - K * independent) > 40 * error  # the control: the mean rate of single tokens


def test_the_l1_distance_is_twice_the_total_variation():
    given = rows()
    p_NV, q_NV = (logits.softmax(-1) for logits in (given.target_logits_NV, given.drafter_logits_NV))
    tvd_N = of(losses.entry("tvd").settings(), given, index())
    torch.testing.assert_close(2 * tvd_N, (p_NV - q_NV).abs().sum(-1), rtol=0, atol=1e-14)


# ---------------------------------------------------------------- settings


def test_it_refuses_a_loss_of_dependent_rows():
    assert DPaceSettings(loss=LKHybridSettings()).check() == []
    for inner in (BlockAcceptanceSettings(), TVDPPSettings(scope="sequence"), DPaceSettings()):
        assert DPaceSettings(loss=inner).check() == [f"loss: its rows must not depend on each other, got {inner.kind}"]
    assert DPaceSettings(chance="acceptance").check() == [
        "chance: acceptance needs a loss that compares with the target, got ce"
    ]
    assert DPace(DPaceSettings(loss=ForwardKLSettings())).needs_target
    assert not DPace().needs_target


def documented_loss() -> str:
    """Return the YAML of the cold start in `docs/losses.md`."""
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    return page.split("## Cold start")[1].split("```yaml\n")[1].split("```")[0]


def test_the_documented_cold_start_moves_from_the_hybrid_to_the_block(tmp_path):
    """At its first step only the weighed hybrid has a gradient, at the end only the block."""
    text = (Path(__file__).parents[2] / "recipes" / "tiny_medusa.yaml").read_text()
    before, rest = text.split("\nloss:", 1)
    after = rest[rest.index("\n\n") :]
    (tmp_path / "recipe.yaml").write_text(f"{before}\n{documented_loss()}{after}")
    loss = losses.build(load_recipe(tmp_path / "recipe.yaml").loss)
    given, where = rows(), index()
    hybrid = d_pace_gradient(given, where, loss=LKHybridSettings())
    block = gradient(of(BlockAcceptanceSettings(), given, where).sum(), given)
    for step, wanted in ((0, hybrid), (1999, hybrid), (3000, (hybrid + block) / 2), (4000, block)):
        at = RowIndex(where.sequence_N, where.depth_N, where.block_N, step=step, deepest=K)
        found = gradient(loss.combine(loss.per_row(given), at).sum(), given)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14, msg=f"step {step}")
