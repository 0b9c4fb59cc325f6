"""Staged distillation: from a step on, the weight of the target's term is 0, and training is that of the other terms alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.losses import Loss, losses
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.d_pace import DPaceSettings
from drafttrain.losses.forward_kl import ForwardKLSettings
from drafttrain.losses.step import batch_loss
from drafttrain.losses.weighted_sum import Term, WeightedSumSettings
from drafttrain.target_model.logits import LiveRows
from drafttrain.training.target_outputs import missing
from tests.conftest import random_llama

STOP = 7
CE, KL = CrossEntropySettings(), ForwardKLSettings()


def sum_of(*terms: Term) -> Loss:
    loss: Loss = losses.build(WeightedSumSettings(terms=list(terms)))
    return loss


def staged(*, until: int = STOP) -> Loss:
    return sum_of(Term(loss=CE), Term(loss=KL, weight=0.5, final_weight=0.0, from_step=STOP, until_step=until))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return random_llama(seed=1, num_layers=1), random_llama(seed=2)


@pytest.fixture(scope="module")
def batch(models: tuple[Any, Any]) -> DraftBatch:
    texts = torch.randint(1, 257, (2, 14)).tolist()
    records = [Record(str(i), text, [True] * len(text)) for i, text in enumerate(texts)]
    made, _ = pack(records, width=28, weight_of_step=1.0)
    teacher = CausalLMDrafter(models[1])
    with torch.no_grad():
        return replace(made, target_rows=LiveRows(models[1], teacher(made).states_BTD[1]))


def step_of(loss: Loss, models: tuple[Any, Any], batch: DraftBatch, step: int) -> tuple[Tensor, list[Tensor]]:
    student = models[0].requires_grad_(True)
    student.zero_grad()
    made = batch_loss(CausalLMDrafter(student), loss, replace(batch, step=step), vocab_size=257)
    made.total.backward()
    return made.loss_N, [p.grad.clone() for p in student.parameters()]


def nested() -> Loss:
    """A stage inside of a sum that is weighed by depth."""
    inner = WeightedSumSettings(terms=[Term(loss=CE), Term(loss=KL, final_weight=0.0, from_step=STOP, until_step=STOP)])
    return sum_of(Term(loss=DPaceSettings(loss=inner, smoothing=1.0)))


@pytest.mark.parametrize("step", [STOP, STOP + 1, 1000])
def test_from_the_stage_boundary_on_a_step_is_one_of_pure_cross_entropy(
    models: tuple[Any, Any], batch: DraftBatch, step: int
) -> None:
    loss_N, gradients = step_of(staged(), models, batch, step)
    wanted_N, wanted = step_of(losses.build(CE), models, batch, step)
    assert torch.equal(loss_N, wanted_N)
    for one, other in zip(gradients, wanted, strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_before_the_boundary_both_terms_are_trained(models: tuple[Any, Any], batch: DraftBatch) -> None:
    loss_N, gradients = step_of(staged(), models, batch, STOP - 1)
    (ce_N, of_ce), (kl_N, of_kl) = (step_of(losses.build(one), models, batch, STOP - 1) for one in (CE, KL))
    torch.testing.assert_close(loss_N, ce_N + 0.5 * kl_N)
    for found, one, other in zip(gradients, of_ce, of_kl, strict=True):
        assert (found - one - 0.5 * other).norm() < 1e-5 * found.norm()
    # The control: a stage that ends later still distils after the boundary.
    late_N, _ = step_of(staged(until=2 * STOP), models, batch, STOP + 1)
    assert (late_N - ce_N).abs().max() > 0.1


def test_the_target_is_not_read_after_the_boundary(models: tuple[Any, Any], batch: DraftBatch) -> None:
    drafter, alone = CausalLMDrafter(models[0]), replace(batch, target_rows=None)
    for loss in (staged(), nested()):
        reads = [missing(drafter, loss, replace(alone, step=step)) for step in (0, STOP - 1, STOP, STOP + 1)]
        assert [found is not None for found in reads] == [True, True, False, False]
        assert loss.needs_target, "a run loads the target for its first steps"
    # A step without the target's rows is the same step.
    loss_N, gradients = step_of(staged(), models, batch, STOP)
    alone_N, without = step_of(staged(), models, alone, STOP)
    assert torch.equal(loss_N, alone_N)
    assert all(torch.equal(one, other) for one, other in zip(gradients, without, strict=True))
    with pytest.raises(AssertionError, match="reads the target before the loss"):
        step_of(staged(), models, alone, STOP - 1)
    # A depth of a block of 5 weighs 5, 4, ..., 1 with smoothing 1.
    paced_N, _ = step_of(nested(), models, alone, STOP)
    ratio_N = paced_N / loss_N
    torch.testing.assert_close(ratio_N, ratio_N.round(), rtol=1e-4, atol=1e-4)


def test_chances_that_are_acceptance_rates_read_the_target_at_every_step() -> None:
    inner = WeightedSumSettings(terms=[Term(loss=CE), Term(loss=KL, final_weight=0.0, from_step=STOP, until_step=STOP)])
    loss: Any = losses.build(DPaceSettings(loss=inner, chance="acceptance"))
    assert loss.reads_target(STOP)
    assert not loss.runs_without_target


def test_a_sum_that_would_train_nothing_is_refused() -> None:
    fades = Term(loss=KL, final_weight=0.0, from_step=3, until_step=STOP)
    assert WeightedSumSettings(terms=[fades]).check() == [
        "terms: at optimizer step 7 all weights are 0: nothing is trained"
    ]
    rises = Term(loss=CE, weight=0.0, final_weight=1.0, from_step=5, until_step=9)
    assert WeightedSumSettings(terms=[fades, rises]).check() == []
    assert WeightedSumSettings(terms=[rises]).check()[0].startswith("terms: at optimizer step 0")
