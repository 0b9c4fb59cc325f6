"""Optimizer steps on pretended GPUs: a micro-batch with what the target knows of it, and a whole training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters import Drafter
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.cuda.models import packed


def with_target(target: Target, drafter: Drafter) -> DraftBatch:
    """Return a micro-batch on the device, with what the target knows of it."""
    batch = packed().to(target.device)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    return replace(batch, target=seen, target_rows=target.rows_of(seen))


def trained(
    drafter: Drafter,
    target: Target,
    loss: Any,
    folder: Path,
    *,
    estimate: Callable[[Any], dict[str, Any]] | None = None,
    **settings: Any,
) -> None:
    """Take some optimizer steps of two micro-batches each under bf16-mixed."""
    chosen = {
        **{"max_steps": 2, "batch_size": 6, "records_per_device": 3, "warmup_steps": 0, "precision": "bf16-mixed"},
        **{"log_every_steps": 1000, "eval_every_steps": 0, "checkpoint_every_steps": 1000, "loggers": ["csv"]},
        **settings,
    }
    train(
        drafter,
        losses.build(loss),
        target=target,
        of_step=lambda step: [packed(step=step), packed(step=step)],
        estimate=estimate,
        settings=TrainSettings(**chosen),
        vocab_size=target.num_tokens,
        folder=folder,
    )
