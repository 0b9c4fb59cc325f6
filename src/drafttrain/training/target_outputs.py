"""The target's outputs that a drafter and its loss read of a micro-batch: which are missing, and reading them."""

from __future__ import annotations

from dataclasses import replace

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss
from drafttrain.target_model import Target


def rows_missing(loss: Loss, batch: DraftBatch) -> bool:
    """Return whether the loss reads the target's distribution, and the micro-batch came without it."""
    return loss.reads_target(batch.step) and batch.target_rows is None


def missing(drafter: Drafter, loss: Loss, batch: DraftBatch) -> TargetNeeds | None:
    """Return what is to be read of the target for a micro-batch; None: it has all that is needed."""
    needs, rows = drafter.needs(), rows_missing(loss, batch)
    if not rows and (batch.target or TargetOutput()).has(needs):
        return None
    return needs | TargetNeeds(final=rows)


def with_target(batch: DraftBatch, target: Target, needs: TargetNeeds, loss: Loss) -> DraftBatch:
    """Return a micro-batch with these outputs of the target, on the device of its tokens."""
    seen = target.read(
        batch.tokens_BT, batch.positions_BT, needs, documents=batch.packed_documents, images=batch.images
    )
    rows = target.rows_of(seen) if rows_missing(loss, batch) else batch.target_rows
    return replace(batch, target=seen.to(batch.tokens_BT.device), target_rows=rows)
