"""Stored sums over the target's vocabulary: a step with them equals a step with the target's whole head, and needs only a part of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drafttrain.core.probability import likeliest
from drafttrain.core.target_rows import PartialTargetRows, RowsAsked, TargetNeeds
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.training_data import TrainingData, attach_cache, prepare
from drafttrain.drafters.eagle.eagle3 import Eagle3Drafter, Eagle3Settings
from drafttrain.losses import losses
from drafttrain.losses.align import planned
from drafttrain.losses.step import BatchLoss, batch_loss
from drafttrain.target_model import Target, TargetSettings, logits


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and then it sleeps; " * 30)
    return path


@pytest.fixture(scope="module")
def target3(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=3))))


def cached(text: Path, target: Target, needs: TargetNeeds, *, own_vocabulary: bool) -> TrainingData:
    chosen = DataSettings(sources=[TextSettings(path=str(text))], max_length=32, cache="states")
    data = prepare(chosen, text.parent / "d", tokenizer=target.tokenizer, tokenizer_fingerprint="x", seed=0)
    attach_cache(data, text.parent / "d", target, num_records=24, own_vocabulary=own_vocabulary, needs=needs)
    return data


def eagle3(target: Target) -> Eagle3Drafter:
    torch.manual_seed(0)
    drafter = Eagle3Drafter.create(Eagle3Settings(draft_vocab_size=40, num_steps=3), target=target, tokenizer=None)
    drafter.fit_vocabulary(lambda: torch.arange(target.vocab_size).float())
    return drafter.train()


def step(drafter: Eagle3Drafter, data: TrainingData, target: Target, kind: str) -> BatchLoss:
    drafter.zero_grad()
    (batch,) = data.of_step(0, batch_size=8)
    loss = losses.build(losses.entry(kind).settings())
    made = batch_loss(drafter, loss, batch, vocab_size=target.num_tokens, measured=True)
    made.total.backward()
    return made


@pytest.mark.parametrize("kind", ["forward_kl", "lk_hybrid", "tvdpp", "reverse_kl"])
def test_a_step_with_sums_equals_a_step_with_the_whole_head(text, target3, kind, monkeypatch):
    drafter = eagle3(target3)
    whole = step(drafter, cached(text, target3, drafter.needs(), own_vocabulary=False), target3, kind)
    wanted = drafter.lm_head.weight.grad.clone()
    data = cached(text, target3, drafter.needs(), own_vocabulary=True)
    monkeypatch.setattr(logits, "head_logits", lambda *_: pytest.fail("the target's whole head was run"))
    part = step(drafter, data, target3, kind)
    torch.testing.assert_close(part.loss_N, whole.loss_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.acceptance_N, whole.acceptance_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(drafter.lm_head.weight.grad, wanted, rtol=1e-5, atol=1e-7)
    assert 0 < int((part.loss_N == 0).sum()) < len(part.loss_N)  # some rows cannot be learned, and they are the same


def test_control_another_likeliest_token_changes_the_loss(text, target3):
    drafter = eagle3(target3)
    data = cached(text, target3, drafter.needs(), own_vocabulary=True)
    before = step(drafter, data, target3, "forward_kl").loss_N
    assert drafter.vocabulary is not None
    for files in data.caches[0].files:
        files.write({"likeliest": np.full_like(files.open("likeliest"), int(drafter.vocabulary[0]))}, {})
    data = cached(text, target3, drafter.needs(), own_vocabulary=True)
    after = step(drafter, data, target3, "forward_kl").loss_N
    assert (after > 0).sum() > (before > 0).sum()


def test_sums_are_added_to_a_cache_that_lacks_them_and_its_states_are_kept(text, target3, monkeypatch):
    needs = TargetNeeds(hidden=(1,))
    cached(text, target3, needs, own_vocabulary=False)
    folder = text.parent / "d" / "0-cache"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    monkeypatch.setattr(Target, "read", lambda *_, **__: pytest.fail("the target was run"))
    data = cached(text, target3, needs, own_vocabulary=True)
    assert {path.name[:-10] for path in folder.glob("*.npy")} == {"hidden_1", "final", "likeliest", "log_total"}
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    (batch,) = data.of_step(0, batch_size=8)
    assert isinstance(batch.target_rows, PartialTargetRows)
    (asked,) = planned(batch, [RowsAsked((1,), lag=0)]).plan.rows.values()
    index_N = asked.target_N
    seen = batch.target_rows.of_tokens(index_N, torch.arange(target3.num_tokens))
    assert torch.equal(seen.likeliest_N, seen.logits_NR.argmax(dim=-1))
    torch.testing.assert_close(seen.log_total_N, seen.logits_NR.logsumexp(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 257])
def test_the_likeliest_token_is_argmax_also_of_equal_ones(dtype, width):
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randint(0, 9, (500, width), generator=generator).to(dtype)
    assert torch.equal(likeliest(logits_NV), logits_NV.argmax(dim=-1))
    assert not torch.equal(
        likeliest(logits_NV), width - 1 - logits_NV.flip(-1).argmax(dim=-1)
    )  # the last of equal ones
