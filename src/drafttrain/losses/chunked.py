"""From aligned rows to loss_N: in one piece, or in chunks straight from hidden states so that no logits tensor exists.

N = rows, V = the target's vocabulary, R = the drafter's vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drafttrain.core.records import AlignedRows, DraftBatch, DraftOutput, LossRows, NamedTargetRows, RowIndex
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.losses import Loss
from drafttrain.losses.buckets import in_buckets, known_acceptance

WHOLE_BYTES = 256 * 2**20
"""Logits up to this size are kept for the backward pass; larger ones are computed again, piece by piece."""

CPU_PIECE_BYTES = 8 * 2**20
"""On a CPU larger tensors leave its caches and are mapped anew each time: a step takes twice as long."""

ACCEPTANCE = "acceptance rate"
LEARNABLE = "learnable"


def _full_precision(like: Tensor) -> torch.autocast:
    """Return the context in which losses are computed: autocast would sum products of probabilities in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


class Weighted(Protocol):
    """A micro-batch that knows what the whole optimizer step weighs."""

    @property
    def weight_of_step(self) -> float: ...


def row_losses(
    loss: Loss,
    drafted: DraftOutput,
    rows: AlignedRows,
    batch: DraftBatch,
    *,
    vocab_size: int,
    chunk_rows: int | None = None,
    measured: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return (loss_N float32, acceptance_N without gradient, None when there is no target or it is not measured).

    Of a drafter with a vocabulary of its own, rows whose answer it cannot say have loss 0 and no part in `combine`; their
    acceptance rate, like that of all rows, is over the target's whole vocabulary.

    Args:
        vocab_size: Ids that target, drafter and tokenizer share; logits are cut to these, so padding has no mass.
        chunk_rows: Rows whose logits exist at once; they are computed again in the backward pass. None: all logits are
            kept unless they exceed 256 MiB.
        measured: Compute the acceptance rate, which costs some hundredths of a step.
    """
    count, row_bytes = len(rows.tokens_N), vocab_size * 4
    again = (count > chunk_rows if chunk_rows else count * row_bytes > WHOLE_BYTES) and torch.is_grad_enabled()
    chunk = chunk_rows or (CPU_PIECE_BYTES if rows.tokens_N.device.type == "cpu" else WHOLE_BYTES) // row_bytes
    parts: list[Mapping[str, Tensor]] = []
    untrained: list[Tensor] = []
    first = 0
    for depth, size in rows.counts.items():
        states_RD = drafted.states_BTD[depth].flatten(0, 1)
        if not size:
            # Nothing of this depth is trained here, yet every rank must take the same backward pass, through the head too.
            untrained.append(0.0 * drafted.head(states_RD[:1], depth).float().sum())
        for start in range(first, first + size, max(1, chunk)):
            chosen = slice(start, min(start + chunk, first + size))
            arguments = (
                states_RD[rows.drafter_N[chosen]],
                depth,
                chosen,
                loss,
                drafted,
                rows,
                batch,
                vocab_size,
                measured,
            )
            parts.append(checkpoint(_values, *arguments, use_reentrant=False) if again else _values(*arguments))
        first += size
    if not parts:
        return torch.stack(untrained)[:0], None
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    acceptance_N = values.pop(ACCEPTANCE, None)
    with _full_precision(rows.tokens_N):
        loss_N = _combined(loss, values, rows.index)
    if drafted.depth_weights:
        factors = [
            loss_N.new_full((size,), drafted.depth_weights.get(depth, 1.0)) for depth, size in rows.counts.items()
        ]
        loss_N = loss_N * torch.cat(factors)
    return loss_N + sum(untrained), acceptance_N


def _combined(loss: Loss, values: dict[str, Tensor], index: RowIndex) -> Tensor:
    """Return the loss of every row; those that cannot be learned are left out and have 0."""
    learnable_N = values.pop(LEARNABLE, None)
    if learnable_N is None or bool(learnable_N.all()):
        return loss.combine(values, index).float()
    if not learnable_N.any():
        # Every rank must take the same backward pass.
        return 0.0 * torch.stack([value.float() for value in values.values()]).sum(dim=0)
    chosen = {name: value[learnable_N] for name, value in values.items()}
    chosen_index = RowIndex(
        index.sequence_N[learnable_N], index.depth_N[learnable_N], index.block_N[learnable_N], index.step
    )
    loss_C = loss.combine(chosen, chosen_index).float()
    return loss_C.new_zeros(len(learnable_N)).index_put((learnable_N.nonzero()[:, 0],), loss_C)


def _values(
    states_ND: Tensor,
    depth: int,
    chosen: slice,
    loss: Loss,
    drafted: DraftOutput,
    rows: AlignedRows,
    batch: DraftBatch,
    vocab_size: int,
    measured: bool,
) -> dict[str, Tensor]:
    """Return the named values of some rows of one depth; inside, and only here, their logits exist."""
    target_logits_NV = None
    named = None
    if loss.needs_target and isinstance(batch.target_rows, NamedTargetRows) and drafted.vocabulary is None:
        named = batch.target_rows.named(rows.target_N[chosen])
    elif loss.needs_target:
        assert batch.target_rows is not None, "the module reads the target before the loss"
        target_logits_NV = batch.target_rows.at(rows.target_N[chosen])[:, :vocab_size]
    loss_rows = LossRows(
        drafter_logits_NV=drafted.head(states_ND, depth)[:, :vocab_size],
        target_logits_NV=target_logits_NV,
        tokens_N=rows.tokens_N[chosen],
        seed_N=rows.seed_N[chosen],
    )
    if drafted.vocabulary is not None:
        with _full_precision(states_ND):
            return in_draft_vocabulary(loss, loss_rows, drafted.vocabulary, vocab_size=vocab_size, measured=measured)
    if named is not None:
        loss_rows = in_buckets(loss_rows, named)
    with _full_precision(states_ND):
        values = dict(loss.per_row(loss_rows))
    if named is not None and measured:
        with torch.no_grad():
            values[ACCEPTANCE] = known_acceptance(loss_rows).detach()
    elif loss.needs_target and measured:
        with torch.no_grad():
            values[ACCEPTANCE] = loss_rows.acceptance_N.detach()
    return values


def in_draft_vocabulary(
    loss: Loss, rows: LossRows, vocabulary_R: Tensor, *, vocab_size: int, measured: bool
) -> dict[str, Tensor]:
    """Return the values of rows whose drafter says only these of the target's tokens.

    The loss sees the target's law on them, renormalised. A row can be learned where the target's likeliest token is one of
    them; without a target, where the label is.
    """
    draft_id_V = DraftVocabulary(vocabulary_R, num_tokens=vocab_size).places(size=vocab_size)
    labels_N = draft_id_V[rows.tokens_N]
    if rows.target_logits_NV is None:
        restricted = LossRows(rows.drafter_logits_NV, None, labels_N, rows.seed_N)
        return dict(loss.per_row(restricted)) | {LEARNABLE: labels_N >= 0}
    log_p_NR = rows.log_p_NV[:, vocabulary_R]
    restricted = LossRows(rows.drafter_logits_NV, log_p_NR, labels_N, rows.seed_N)
    values = dict(loss.per_row(restricted))
    if measured:
        # Not renormalised: what the target would say outside the drafter's vocabulary is never accepted.
        values[ACCEPTANCE] = torch.minimum(log_p_NR, restricted.log_q_NV.detach()).exp().sum(dim=-1)
    values[LEARNABLE] = draft_id_V[rows.target_logits_NV.argmax(dim=-1)] >= 0
    return values


def summed(loss_N: Tensor, drafted: DraftOutput) -> Tensor:
    """Return the sum over a micro-batch's rows, with what the drafter adds by itself."""
    return loss_N.sum() if drafted.extra_loss is None else loss_N.sum() + drafted.extra_loss


def normalised(total: Tensor, batch: Weighted, *, world_size: int, accumulation: int) -> Tensor:
    """Return the micro-batch's part of the mean over all trained positions of an optimiser step, from its sum.

    Ranks and micro-batches are averaged by those who add gradients up, hence the two factors.
    """
    return total * (world_size * accumulation / batch.weight_of_step)
