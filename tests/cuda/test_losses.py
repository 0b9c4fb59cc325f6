"""Every loss on one GPU under bf16-mixed: its values are float32, as it promises, and those that float32 training has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.losses import head_products, losses
from drafttrain.losses.align import align
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.step import drafted_loss
from drafttrain.losses.tvdpp import TVDPPSettings
from drafttrain.losses.weighted_sum import Term, WeightedSumSettings
from drafttrain.target_model import Target
from tests.cuda.models import new_drafter
from tests.cuda.steps import with_target

pytestmark = pytest.mark.pretended_cuda


def every_loss() -> dict[str, Any]:
    """Return settings of every loss that is registered, and of what is computed otherwise by them."""
    found: dict[str, Any] = {}
    for name in losses.names():
        settings = losses.entry(name).settings
        required = [field for field in fields(settings) if field.name == "terms"]
        if not required:
            found[name] = settings()
    for scope in ("batch", "position"):
        found[f"tvdpp {scope}"] = TVDPPSettings(scope=scope)  # type: ignore[arg-type]
    found["tvdpp sampled"] = TVDPPSettings(estimator="sampled", num_samples=3)
    found["sum"] = WeightedSumSettings([Term(found["forward_kl"]), Term(found["tvd"], 0.5)])
    return found


LOSSES = every_loss()


def test_every_registered_loss_is_here() -> None:
    assert {settings.kind for settings in LOSSES.values()} == set(losses.names())


@pytest.mark.parametrize("chunk_rows", [None, 8])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_change_a_loss(name: str, chunk_rows: int | None, target: Target) -> None:
    """It takes products of probabilities in bfloat16 on CUDA, sums over them among those, which it does not on a CPU."""
    drafter = new_drafter("causal_lm", target)
    batch = with_target(target, drafter)
    found = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        loss = losses.build(LOSSES[name]).to("cuda:0").train()
        drafted = drafter(batch)
        rows = align(drafted, batch, block_length=getattr(loss, "block_length", 1))
        # The states and the head are those of float32: only what the loss itself computes is under autocast.
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            scores_BT = drafted.states_BTD[1].float().mean(dim=-1)
            drafted = replace(drafted, head=in_float32(drafted.head), confidence_BT={1: scores_BT})
            loss_N, _ = row_losses(loss, drafted, rows, batch, vocab_size=257, chunk_rows=chunk_rows)
        loss_N.sum().backward()
        loss.end_of_step()
        assert loss_N.dtype == torch.float32
        found[enabled] = [loss_N.detach().cpu(), *(p.grad.cpu() for p in drafter.parameters() if p.grad is not None)]
        drafter.zero_grad()
    for plain, mixed in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-6)


def in_float32(head: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Return a drafter's head as it is without autocast."""

    def computed(states_ND: Tensor, depth: int) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return head(states_ND, depth)

    return computed


@pytest.mark.parametrize("as_promised", [True, False], ids=["in place", "control: a product of its own"])
def test_the_gradient_of_a_trained_head_is_added_up_in_float32(
    as_promised: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it does not matter in how many pieces; products that bfloat16 rounds before they are added differ."""
    monkeypatch.setattr(head_products, "ADDS_IN_FLOAT32", as_promised)
    drafter = new_drafter("medusa", target)
    batch = with_target(target, drafter)
    found = []
    for chunk_rows in (None, 4):
        loss = losses.build(LOSSES["forward_kl"])
        with torch.autocast("cuda", torch.bfloat16):
            drafted = drafter(batch)
            made = drafted_loss(loss, drafted, align(drafted, batch), batch, vocab_size=257, chunk_rows=chunk_rows)
        made.total.backward()
        (weight_VD, *_) = drafted.head.parameters(1)  # type: ignore[attr-defined]
        found.append(weight_VD.grad.cpu())
        drafter.zero_grad()
    whole_VD, pieces_VD = found
    assert whole_VD.dtype == torch.float32
    assert bool((whole_VD - pieces_VD).norm() <= 1e-6 * whole_VD.norm()) == as_promised
