"""metrics.csv: every figure of a row is of the steps that the row says, and of all that they minimise."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.drafters.eagle_models import eagle_drafter

LR = 0.5


@pytest.fixture
def target() -> Target:
    return Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")


def of_step(step: int) -> list[DraftBatch]:
    """Return texts that are of another step in every step."""
    records = [Record(str(i), [1 + (7 * step + i * j) % 250 for j in range(12)], [True] * 12) for i in range(1, 4)]
    return [pack(records, width=12, weight_of_step=33.0, step=step)[0]]


def rows(folder: Path, drafter: Any, target: Target, **settings: Any) -> list[dict[str, str]]:
    """Train, and return the rows of metrics.csv."""
    chosen = TrainSettings(
        **{"max_steps": 4, "batch_size": 3, "warmup_steps": 3, "lr": LR, "clip_norm": None, "loggers": ["csv"]}
        | settings
    )
    train(
        drafter,
        losses.build(losses.entry("forward_kl").settings()),
        target=target,
        of_step=of_step,
        estimate=None,
        settings=replace(chosen, optimizer="sgd", eval_every_steps=0),
        vocab_size=257,
        folder=folder,
    )
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_lr_is_the_one_that_moved_the_weights(target, tmp_path):
    """Of a step by plain gradient descent: as long as its gradient, times the learning rate."""
    drafter = eagle_drafter("eagle", target).float()
    before = [p.detach().clone() for p in drafter.parameters() if p.requires_grad]
    (row,) = rows(tmp_path, drafter, target, max_steps=1, log_every_steps=1)
    after = [p.detach() for p in drafter.parameters() if p.requires_grad]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert float(row["lr"]) == LR / 4, "the first of three steps of warm-up"
    assert float(moved) == pytest.approx(float(row["lr"]) * float(row["grad_norm"]), rel=1e-3)


def test_the_loss_has_what_the_drafter_adds(target, tmp_path):
    drafter = eagle_drafter("eagle", target, feature_noise=0.0).float().train()
    (batch,) = of_step(0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
    drafted = drafter(batch)
    loss_N, _ = row_losses(
        losses.build(losses.entry("forward_kl").settings()), drafted, align(drafted, batch), batch, vocab_size=257
    )
    alone, added = float(loss_N.detach().mean()), float(drafted.extra_loss.detach()) / len(loss_N)
    assert added > 0.1 * alone
    (row,) = rows(tmp_path, drafter, target, max_steps=1, log_every_steps=1)
    assert float(row["loss"]) == pytest.approx(alone + added, rel=1e-5)


@pytest.mark.parametrize(("kind", "settings"), [("eagle3", {"draft_vocab_size": 120}), ("eagle3", {}), ("eagle", {})])
def test_a_row_has_the_same_figures_however_often_rows_are_written(target, tmp_path, kind, settings):
    """All but the loss, which is the mean of the steps since the row before."""
    seldom, often = (
        rows(tmp_path / str(every), eagle_drafter(kind, target, **settings).float(), target, log_every_steps=every)
        for every in (2, 1)
    )
    assert [row["step"] for row in seldom] == ["2", "4"]
    for two, one in zip(seldom, often[1::2], strict=True):
        for name in ("acceptance_rate", "one_minus_acceptance_rate", "lr", "grad_norm", "tokens", "skipped_steps"):
            assert two[name] == one[name], name
    assert often[0]["acceptance_rate"] != often[1]["acceptance_rate"]
    mean = sum(float(row["loss"]) for row in often[:2]) / 2
    assert float(seldom[0]["loss"]) == pytest.approx(mean, rel=1e-6)


def test_steps_without_a_position_have_no_loss(target, tmp_path):
    """A drafter that looks at the token before the root learns nothing of texts of two tokens."""
    drafter = eagle_drafter("eagle", target).float()
    texts = [pack([Record("a", [5, 9], [False, True])], width=2, weight_of_step=1.0)[0]]
    train(
        drafter,
        losses.build(losses.entry("forward_kl").settings()),
        target=target,
        of_step=lambda step: texts,
        estimate=None,
        settings=TrainSettings(max_steps=1, batch_size=1, loggers=["csv"], eval_every_steps=0),
        vocab_size=257,
        folder=tmp_path,
    )
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == [""]


def test_a_figure_that_a_drafter_measures_has_a_column(target, tmp_path):
    """The share of labels among the candidates, of the step of the row alone; other kinds have no such column."""
    settings = {"block_size": 3, "anchors": 64, "mask_token_id": 0, "num_layers": 1, "selector_top_k": 90}
    drafter = eagle_drafter("dflash2", target, **settings).float().train()
    expected = []
    for step in (0, 1):
        (batch,) = of_step(step)
        seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
        batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
        loss = losses.build(losses.entry("forward_kl").settings())
        total, count = batch_loss(drafter, loss, batch, vocab_size=257).figures["candidate_recall"]
        expected.append(float(total) / count)
    assert expected[0] != expected[1]
    (row,) = rows(tmp_path / "a", drafter, target, max_steps=2, log_every_steps=2, lr=1e-12)
    assert float(row["candidate_recall"]) == pytest.approx(expected[1])
    (row,) = rows(tmp_path / "b", eagle_drafter("eagle", target).float(), target, max_steps=1)
    assert "candidate_recall" not in row
