"""The training of a head: the loss falls, a training that broke off continues bit for bit, the best weights are kept."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.data_gen.stored.labelled_tokens import RowOrder
from drafttrain.eval.head_figures import held_out_estimate
from drafttrain.heads.acceptance import AcceptanceHead, AcceptanceSettings
from drafttrain.heads.rows import HeadRows
from drafttrain.training.metrics_log import TIMES
from drafttrain.training.result import TrainResult
from drafttrain.training.run import train_head
from drafttrain.training.settings import TrainSettings

SETTINGS = TrainSettings(
    max_steps=20, batch_size=32, records_per_device=16, lr=3e-2, warmup_steps=2, eval_every_steps=5, log_every_steps=1,
    checkpoint_every_steps=4, loggers=["csv"],
)  # fmt: skip


def rows(count: int, *, seed: int) -> HeadRows:
    """Return rows whose label follows from the first feature."""
    features_ND = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return HeadRows(features_ND, (2 * features_ND[:, 0]).sigmoid())


def run(folder: Path, *, breaks_at: int | None = None) -> TrainResult:
    torch.manual_seed(0)
    head = AcceptanceHead(AcceptanceSettings(num_blocks=1), 8)
    order, held_out = RowOrder(rows(200, seed=1), head, seed=0), rows(100, seed=2)

    def of_step(step: int) -> Any:
        if step == breaks_at:
            raise RuntimeError("the power went out")
        return order.of_step(step, batch_size=SETTINGS.batch_size, records_per_device=SETTINGS.records_per_device)

    return train_head(
        head,
        of_step=of_step,
        estimate=lambda trained: held_out_estimate(trained, held_out),
        settings=SETTINGS,
        folder=folder,
    )


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def test_a_training_that_broke_off_continues_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(whole)
    with pytest.raises(RuntimeError, match="the power went out"):
        run(broken, breaks_at=11)
    assert not (broken / "train.json").exists()
    assert run(broken) == result
    assert curve(broken) == curve(whole)
    for name in (result.drafter, "last"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (broken, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_it_learns_and_keeps_the_best_weights(tmp_path):
    result = run(tmp_path)
    measured = [row for row in curve(tmp_path) if row["validation_log_likelihood"]]
    assert [row["step"] for row in measured] == ["0", "5", "10", "15", "20"]
    values = [float(row["validation_log_likelihood"]) for row in measured]
    assert values[-1] > values[0] + 0.1
    assert (result.best_by, result.best) == ("log_likelihood", max(values))
    assert float(measured[-1]["validation_auc"]) > float(measured[0]["validation_auc"])
    assert float(measured[-1]["validation_ece"]) < float(measured[0]["validation_ece"]) - 0.05
