"""The operations that a micro-batch of a training needs: drafter and target together."""

from __future__ import annotations

from collections.abc import Iterator

from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of, total
from drafttrain.drafters import Drafter
from drafttrain.heads import TokenHead
from drafttrain.target_model import Target
from drafttrain.target_model.matrix_products import head_parameters, trunk_products


def distill_flops(drafter: Drafter, target: Target | None, shape: BatchShape, *, reads: bool, head: bool) -> int:
    """Return the operations of one micro-batch.

    Args:
        reads: The target's blocks are run here, as far as its states are asked for.
        head: The target's distribution is made from states: its head once for each position that a loss compares with.
    """
    return total([*drafter.work(shape), *_of_target(drafter, target, shape, reads=reads, head=head)])


def _of_target(
    drafter: Drafter, target: Target | None, shape: BatchShape, *, reads: bool, head: bool
) -> Iterator[Products]:
    if target is None:
        return
    needs = drafter.needs()
    if reads:
        whole = head or needs.final or needs.logits or min(needs.hidden, default=0) < 0
        yield from trunk_products(
            target.model, shape, gradients=0, num_blocks=None if whole else max(needs.hidden, default=0)
        )
    if head or drafter.compares_with_target:
        # Once for each position: the depth with the nearest label covers all positions.
        shift = min(asked.lag + min(asked.depths) for asked in drafter.rows_asked())
        yield matrix(head_parameters(target.model), shape.rows(shift), gradients=0)


def head_flops(head: TokenHead, rows: int) -> int:
    """Return the operations of one micro-batch of a head's training."""
    return total([matrix(parameters_of(head), rows, gradients=2)])
