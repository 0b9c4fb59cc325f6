"""The loss of aligned rows by autograd, piece by piece from hidden states: the logits of all rows never exist at once.

N = rows, D = hidden
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.target_rows import AlignedRows
from drafttrain.distributed.collectives import shared
from drafttrain.losses import Loss
from drafttrain.losses.fused import are_spread
from drafttrain.losses.pieces import (
    ACCEPTANCE,
    NO_ROWS,
    Part,
    RowValues,
    TargetPiece,
    connected_zero,
    piece_size,
    pieces,
    target_of,
)

LEARNABLE = "learnable"

WHOLE_BYTES = 256 * 2**20
"""Logits up to this size are stored for the backward pass; larger ones are computed again, piece by piece."""


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

    For a drafter with its own vocabulary, rows that it cannot learn have loss 0 and are left out of `combine`. The acceptance
    rate of every row is over the target's whole vocabulary.

    Args:
        vocab_size: Ids that target, drafter and tokenizer share; logits are cut to these, so padding has no mass.
        chunk_rows: Rows whose logits exist at once; they are computed again in the backward pass. None: all logits are
            stored unless they exceed 256 MiB.
        measured: Compute the acceptance rate, which costs a few percent of a step.
    """
    values = RowValues(loss, drafted, rows, batch, vocab_size=vocab_size, measured=measured)
    count = len(rows.tokens_N)
    again = (count > chunk_rows if chunk_rows else count * vocab_size * 4 > WHOLE_BYTES) and torch.is_grad_enabled()
    planned = pieces([rows], piece_size(rows, columns=values.columns, chunk_rows=chunk_rows))
    spread = are_spread(drafted) and torch.is_grad_enabled()
    if spread:
        # ZeRO-3 gathers a head's weights at every call: all ranks must make the same calls in the same order.
        most, any_again = map(max, zip(*shared([len(planned), again]), strict=True))
        again = bool(any_again)
        planned += [NO_ROWS] * (max(most, 1) - len(planned))
    found: dict[int, dict[str, Tensor]] = {}
    untrained: list[Tensor] = []
    for piece in planned:
        target = target_of([values], piece) if piece.parts else None
        parts = {part.depth: part for part in piece.parts}
        for depth in rows.counts:
            if (part := parts.get(depth)) is None:
                if spread:
                    run = partial(checkpoint, connected_zero, use_reentrant=False) if again else connected_zero
                    untrained.append(run(drafted, depth))
                continue
            states_ND = drafted.states_BTD[part.depth].flatten(0, 1)[rows.drafter_N[part.rows]]
            scores_BT = drafted.confidence_BT.get(part.depth)
            scores_N = None if scores_BT is None else scores_BT.flatten()[rows.drafter_N[part.rows]]
            # A copy: the log-probabilities that the backward pass computes again are not stored.
            arguments = (states_ND, scores_N, part, target and replace(target), drafted, values)
            made = checkpoint(_of_states, *arguments, use_reentrant=False) if again else _of_states(*arguments)
            learnable_N = values.learnable(part, target)
            found[part.rows.start] = made if learnable_N is None else made | {LEARNABLE: learnable_N}
    # Whatever the loss reads, each rank runs the same backward pass.
    untrained += [0.0 * scores_BT.float().sum() for scores_BT in drafted.confidence_BT.values()]
    if not spread:
        untrained += [connected_zero(drafted, depth) for depth, rows_there in rows.counts.items() if not rows_there]
    if not found:
        return torch.stack(untrained)[:0], None
    names = next(iter(found.values()))
    joined = {name: torch.cat([found[start][name] for start in sorted(found)]) for name in names}
    acceptance_N, learnable_N = joined.pop(ACCEPTANCE, None), joined.pop(LEARNABLE, None)
    loss_N = values.combined(joined, rows.index, learnable_N)
    return values.weighted(loss_N, drafted.depth_weights) + sum(untrained), acceptance_N


def _of_states(
    states_ND: Tensor,
    scores_N: Tensor | None,
    part: Part,
    target: TargetPiece | None,
    drafted: DraftOutput,
    values: RowValues,
) -> dict[str, Tensor]:
    """Return the named values of a part's rows. Their logits exist only inside this function."""
    return values.of(part, target, drafted.head(states_ND, part.depth)[:, : values.vocab_size], scores_N)
