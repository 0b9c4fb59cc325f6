"""Training on answers of the drafter itself: the loss is that of the same text as data, and a resumed run is the run."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.batches import DraftBatch, Late
from drafttrain.core.errors import Interrupted
from drafttrain.data_gen.on_policy import OnPolicyData
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.training.checkpoints import weights_of_checkpoint
from drafttrain.training.metrics_log import TIMES
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import random_llama
from tests.data_gen.drawing import drawing, two_sources
from tests.marks import slow

STEPS, BATCH = 6, 6


@pytest.fixture
def data(tmp_path: Path, tiny_target: Target) -> TrainingData:
    """Questions and plain text."""
    return two_sources(tmp_path, tiny_target.tokenizer)


def fit(
    folder: Path,
    target: Target,
    of_step: Callable[[int], Sequence[DraftBatch | Late]],
    *,
    model: Any = None,
    made: OnPolicyData | None = None,
    **settings: Any,
) -> bytes:
    """Train a random drafter; return the file of its weights."""
    asked = TrainSettings(
        max_steps=STEPS,
        batch_size=BATCH,
        records_per_device=2,
        lr=0.01,
        warmup_steps=0,
        loggers=["csv"],
        eval_every_steps=0,
        log_every_steps=1,
        precision="fp32",
    )
    train(
        CausalLMDrafter(model or random_llama(seed=1, num_layers=1)),
        losses.build(losses.entry("reverse_kl").settings()),
        target=target,
        of_step=of_step,
        estimate=None,
        settings=replace(asked, **settings),
        vocab_size=257,
        folder=folder,
        drawing=made,
    )
    return (folder / "last" / "model.safetensors").read_bytes()


def on_policy(
    folder: Path,
    data: TrainingData,
    target: Target,
    *,
    watch: Callable[[int], None] = lambda step: None,
    train_with: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[bytes, list[DraftBatch]]:
    """Train on answers of the drafter; return its weights, and the micro-batches in their order."""
    model = random_llama(seed=1, num_layers=1)
    made = drawing(data, target, drafter=model, **settings)
    seen: list[DraftBatch] = []

    class Watched(Late):
        def made(self) -> DraftBatch:
            seen.append(super().made())
            return seen[-1]

    def of_step(step: int) -> list[Late]:
        watch(step)
        late = made.of_step(step, batch_size=BATCH, records_per_device=2)
        return [Watched(one.of_step, one.number) for one in late]

    return fit(folder, target, of_step, model=model, made=made, **(train_with or {})), seen


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_step_trains_on_its_answers_as_on_the_same_text_in_the_data(
    data: TrainingData, tiny_target: Target, tmp_path: Path
) -> None:
    weights, seen = on_policy(tmp_path / "drawn", data, tiny_target, fraction=0.5, drafter_share=0.7)
    parts = len(seen) // STEPS
    assert parts == 3
    fixed = fit(tmp_path / "fixed", tiny_target, lambda step: seen[step * parts : (step + 1) * parts])
    assert fixed == weights
    # Control: answers of the first weights alone are other texts from the second step on.
    old = drawing(data, tiny_target, fraction=0.5, drafter_share=0.7)
    late = [one for step in range(STEPS) for one in old.of_step(step, batch_size=BATCH, records_per_device=2)]
    of_start = [one.made() for one in late]
    assert all(a.tokens_BT.equal(b.tokens_BT) for a, b in zip(of_start[:parts], seen[:parts], strict=True))
    assert fit(tmp_path / "old", tiny_target, lambda step: of_start[step * parts : (step + 1) * parts]) != weights


def test_without_drawn_records_training_is_that_on_the_data(
    data: TrainingData, tiny_target: Target, tmp_path: Path
) -> None:
    weights, _ = on_policy(tmp_path / "none", data, tiny_target, fraction=0.0)
    of_data = fit(
        tmp_path / "data", tiny_target, lambda step: data.of_step(step, batch_size=BATCH, records_per_device=2)
    )
    assert weights == of_data
    assert weights != on_policy(tmp_path / "some", data, tiny_target, fraction=0.2)[0], "control"


@pytest.mark.parametrize("every_steps", [slow(1), 4])
def test_a_resumed_training_is_the_training(
    data: TrainingData, tiny_target: Target, tmp_path: Path, every_steps: int
) -> None:
    settings: dict[str, Any] = {"fraction": 0.5, "every_steps": every_steps}
    whole, _ = on_policy(tmp_path / "whole", data, tiny_target, **settings)

    def stop(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        on_policy(tmp_path / "parts", data, tiny_target, watch=stop, **settings)
    resumed, seen = on_policy(tmp_path / "parts", data, tiny_target, **settings)
    assert 0 < len(seen) < STEPS * 3
    assert resumed == whole
    timeless = [
        [{name: value for name, value in row.items() if name not in TIMES} for row in rows(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_metrics_have_the_share_and_length_of_the_answers_and_the_time_of_drawing(
    data: TrainingData, tiny_target: Target, tmp_path: Path
) -> None:
    again = {"activation_checkpointing": True, "max_steps": 2}
    _, seen = on_policy(tmp_path / "run", data, tiny_target, fraction=0.5, train_with=again)
    for step, row in enumerate(rows(tmp_path / "run")):
        drawn = [number for batch in seen[3 * step : 3 * step + 3] for number in batch.drawn_tokens]
        written = [number for number in drawn if number]
        assert len(drawn) == BATCH
        assert float(row["drawn_share"]) == len(written) / BATCH
        assert float(row["drawn_tokens"]) == sum(written) / len(written)
        assert float(row["draw_ms"]) > 0
    fit(
        tmp_path / "data",
        tiny_target,
        lambda step: data.of_step(step, batch_size=BATCH, records_per_device=2),
        max_steps=1,
    )
    (row,) = rows(tmp_path / "data")
    assert "drawn_share" not in row
    assert float(row["draw_ms"]) == 0


@pytest.mark.parametrize("every_steps", [slow(1), 2])
def test_the_answers_of_a_step_are_of_the_weights_before_it(
    data: TrainingData, tiny_target: Target, tmp_path: Path, every_steps: int
) -> None:
    kept = {"checkpoint_every_steps": 1, "keep_checkpoints": STEPS}
    _, seen = on_policy(tmp_path / "run", data, tiny_target, train_with=kept, every_steps=every_steps)
    for step in range(every_steps, STEPS, every_steps):
        drafter = CausalLMDrafter(random_llama(num_layers=1))
        reached, weights = weights_of_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.ckpt")
        assert reached == step
        drafter.load_state_dict(weights, strict=False)
        again = drawing(data, tiny_target, drafter=drafter.language_model, every_steps=every_steps)
        late = again.of_step(step, batch_size=BATCH, records_per_device=2)
        own = seen[3 * step : 3 * step + 3]
        assert all(one.made().tokens_BT.equal(batch.tokens_BT) for one, batch in zip(late, own, strict=True)), step
