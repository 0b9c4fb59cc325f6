"""A target in training: outside of its contexts it is the original, inside gradients reach what is trained, and its files read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.lora import LoraAdapter, LoraSettings
from drafttrain.drafters.tuned_target import ADAPTER, WHOLE, TunedTarget, TuningSettings, tuned, tuning_in
from drafttrain.losses.align import align
from drafttrain.losses.step import drafted_loss
from drafttrain.target_model import Target, TargetSettings
from tests.drafters.test_medusa import V, batch_of, texts_of

LORA = LoraSettings(rank=2, alpha=4.0, target_modules=["q_proj", "down_proj"])
WAYS = pytest.mark.parametrize("lora", [LORA, None], ids=["adapters", "whole"])
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder), dtype="float64"))


def read(target: Target) -> DraftBatch:
    batch = batch_of(texts_of(target, 6, seed=1, new=12))
    return replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True)))


def changed(target: Target, lora: LoraSettings | None) -> TunedTarget:
    """Return a target tuned away from the original by a step of its labels."""
    torch.manual_seed(0)
    made = TunedTarget(target, lora, key="drafter.tune.lora")
    made.weights.double()
    batch = read(target)
    optimizer = torch.optim.SGD(made.weights.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        final_BTD, _ = made.read(batch)
        logits_BTV = made.head(final_BTD, 1)
        torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), batch.tokens_BT[:, 1:].flatten()).backward()
        optimizer.step()
    return made


def logits(target: Target) -> Tensor:
    found: Tensor = target.model(TOKENS).logits.detach()
    return found


@WAYS
def test_outside_of_its_contexts_the_target_is_the_original(target: Target, lora: LoraSettings | None):
    before, digest = logits(target), target.weights_digest()
    made = changed(target, lora)
    assert torch.equal(logits(target), before)
    assert target.weights_digest() == digest
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    with made.applied():
        assert (logits(target) - before).norm() > 1e-3 * before.norm()
    assert torch.equal(logits(target), before)


@WAYS
def test_gradients_reach_every_trained_weight_and_nothing_of_the_target(target: Target, lora: LoraSettings | None):
    made = changed(target, lora)
    for name, parameter in made.weights.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert all(parameter.grad is None for parameter in target.model.parameters())


@WAYS
def test_its_files_give_the_target_in_memory(target: Target, lora: LoraSettings | None, tmp_path: Path):
    made = changed(target, lora)
    made.save(tmp_path)
    assert tuning_in(tmp_path) == tmp_path / (WHOLE if lora is None else ADAPTER)
    again = tuned(target, tuning_in(tmp_path))
    with made.applied():
        wanted = logits(target)
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-10)
    assert again.name != target.name
    assert (wanted - logits(target)).norm() > 1e-3 * wanted.norm()
    assert tuned(target, tuning_in(tmp_path / "nowhere")) is target


@WAYS
def test_the_divergence_is_the_kl_of_original_and_tuned(target: Target, lora: LoraSettings | None):
    made, batch = changed(target, lora), read(target)
    final_BTD, _ = made.read(batch)
    beside = made.divergence(final_BTD, batch)
    its = replace(batch, target_rows=beside.target_rows)
    found = drafted_loss(beside.loss, beside.drafted, align(beside.drafted, its), its, vocab_size=V).total
    with torch.no_grad(), made.applied():
        own = target.model(batch.tokens_BT, position_ids=batch.positions_BT).logits.log_softmax(-1)
    base = target.model(batch.tokens_BT, position_ids=batch.positions_BT).logits.log_softmax(-1)
    kl_BT = (base.exp() * (base - own)).sum(-1)
    wanted = float(kl_BT[:, :-1][batch.loss_mask_BT[:, 1:]].sum())
    assert wanted > 1e-3
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_copy_of_tied_weights_is_one_weight(target: Target):
    assert target.model.config.tie_word_embeddings
    made = TunedTarget(target, None, key="")
    assert len(list(made.weights.parameters())) == len(list(target.model.parameters()))
    assert made.head.matrices(1)[0] is made.weights.of("model.embed_tokens", "weight")  # type: ignore[attr-defined, union-attr]


def test_the_head_has_no_adapter(target: Target):
    with pytest.raises(CheckpointError, match=r"drafter\.tune\.lora\.target_modules: .* is called lm_head"):
        TunedTarget(target, replace(LORA, target_modules=["lm_head"]), key="drafter.tune.lora")
    assert isinstance(TunedTarget(target, LORA, key="").weights, LoraAdapter)
    assert TuningSettings(lora=replace(LORA, whole_modules=["norm"])).check()
