"""The training step: a drafter computes its states, `align` finds the rows, the loss is summed over them.

N = rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.target_rows import AlignedRows, RowsAsked
from drafttrain.losses import Loss
from drafttrain.losses.align import align, planned
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.fused import can_be_fused, fused_loss
from drafttrain.losses.pieces import RowValues, piece_size, pieces


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a micro-batch."""

    total: Tensor
    """The sum over rows that is differentiated, with the losses that the drafter adds."""
    loss_N: Tensor
    """float32, without gradient."""
    acceptance_N: Tensor | None
    """Without gradient; None when there is no target or it is not measured."""
    figures: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    """Further figures of the loss that is trained beside the drafts: (sum over rows, rows) by name."""


class AsksRows(Protocol):
    """What the plan of a batch needs of a `drafters.Drafter`."""

    @property
    def reads_slots(self) -> bool:
        """Its forward computes only the slots that the rows of the loss need."""
        ...

    def rows_asked(self) -> Sequence[RowsAsked]:
        """Return which rows training reads, those of the loss first."""
        ...

    def with_own_text(self, batch: DraftBatch) -> DraftBatch:
        """Return a batch with its text in the drafter's own tokens, if it has others."""
        ...


def batch_loss(
    drafter: Callable[[DraftBatch], DraftOutput],
    loss: Loss,
    batch: DraftBatch,
    *,
    vocab_size: int,
    chunk_rows: int | None = None,
    measured: bool = False,
) -> BatchLoss:
    """Run the drafter on a micro-batch and return its loss. Every training goes through here.

    Args:
        drafter: A `drafters.Drafter`.
        batch: With the target's states and rows that the drafter and the loss need.
        vocab_size: Ids that target, drafter and tokenizer share; logits are cut to these, so padding has no mass.
        chunk_rows: Rows whose logits exist at once; None: by size.
        measured: Compute the acceptance rate, which costs a few percent of a step.
    """
    drafted = drafter(batch)
    rows = align(drafted, batch, block_length=loss.block_length)
    made = drafted_loss(loss, drafted, rows, batch, vocab_size=vocab_size, chunk_rows=chunk_rows, measured=measured)
    figures = {name: value for beside in drafted.beside if beside.loss for name, value in beside.loss.figures().items()}
    made = replace(made, figures=figures)
    return made if drafted.extra_loss is None else replace(made, total=made.total + drafted.extra_loss)


def with_plan(drafter: AsksRows, loss: Loss, batch: DraftBatch) -> DraftBatch:
    """Return a batch that is still on the host with the rows that the loss and the drafter will ask for."""
    of_loss, *others = drafter.rows_asked()
    asked = [replace(of_loss, block_length=loss.block_length), *others]
    return planned(drafter.with_own_text(batch), asked, slots=drafter.reads_slots)


def drafted_loss(
    loss: Loss,
    drafted: DraftOutput,
    rows: AlignedRows,
    batch: DraftBatch,
    *,
    vocab_size: int,
    chunk_rows: int | None = None,
    measured: bool = True,
) -> BatchLoss:
    """Return the loss of drafted states: its sum over rows, and the sums of the losses that the drafter trains beside its drafts.

    The gradient is computed while a piece of logits exists, where the weights of the drafter's head are known and on this process.
    Otherwise the head runs again in the backward pass.
    """
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "chunk_rows": chunk_rows}
    values = RowValues(loss, drafted, rows, batch, vocab_size=vocab_size, measured=measured)
    terms = [(values, drafted)]
    beside = [(one.loss or loss, one.drafted, replace(batch, target_rows=one.target_rows)) for one in drafted.beside]
    for its_loss, its_drafted, its_batch in beside:
        its_rows = align(its_drafted, its_batch, block_length=its_loss.block_length)
        its = RowValues(its_loss, its_drafted, its_rows, its_batch, vocab_size=vocab_size, measured=False)
        terms.append((its, its_drafted))
    together = torch.is_grad_enabled() and all(can_be_fused(each) for _, each in terms)
    if beside and not (together and all(values.can_share_target(its) for its, _ in terms)):
        alone = drafted_loss(loss, replace(drafted, beside=()), rows, batch, **sizes, measured=measured)
        added = [
            drafted_loss(its_loss, its_drafted, its.rows, its_batch, **sizes, measured=False)
            for (its_loss, its_drafted, its_batch), (its, _) in zip(beside, terms[1:], strict=True)
        ]
        return replace(alone, total=sum([one.total for one in added], alone.total))
    if not can_be_fused(drafted) or not torch.is_grad_enabled():
        loss_N, acceptance_N = row_losses(loss, drafted, rows, batch, **sizes, measured=measured)
        return BatchLoss(loss_N.sum(), loss_N.detach(), acceptance_N)
    size = piece_size(rows, columns=max(each.columns for each, _ in terms), chunk_rows=chunk_rows)
    return BatchLoss(*fused_loss(terms, pieces([each.rows for each, _ in terms], size)))


class Weighted(Protocol):
    """A micro-batch that carries the weight of the whole optimizer step."""

    @property
    def weight_of_step(self) -> float: ...


def share_of_step(total: Tensor, batch: Weighted, *, world_size: int, accumulation: int) -> Tensor:
    """Return a micro-batch's share of the mean over all trained positions of the optimizer step, from its sum.

    Gradients are averaged over ranks and micro-batches afterwards, hence the two factors.
    """
    return total * (world_size * accumulation / batch.weight_of_step)
