"""Mask slots: which rows have one of which depth, and which keys of its own row each attends to.

M = mask slots, N = slots of all rows of a batch, one after another, K = depths, E = mask slots of a row at most (K - 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.few_sizes import few_sizes
from drafttrain.drafters.dflash.blocks import Blocks


@dataclass(frozen=True)
class MaskSlots:
    """The mask slots of a pass, row by row and in each row by depth: the slot `ahead` places after its row predicts depth 1 + `ahead`.

    A row that has a mask slot has all those before it. A slot attends to its document up to its row, and to its row's mask slots up
    to itself.
    """

    rows: Blocks
    """The row of each slot: for the attention every slot is a block of its own."""
    ahead_M: Tensor
    own_ME: Tensor
    """Place of each mask slot of the same row; of those after it, its own place."""
    hidden_M1K: Tensor
    """Of (the real row, its mask slots): those that the slot does not attend to."""
    of_depth: Mapping[int, Tensor]
    """By depth from 2 on, the places of its slots, in the order of their rows."""

    @classmethod
    def of(
        cls, rows: Mapping[int, tuple[Tensor, Tensor]], documents: PackedDocuments, *, few: bool = False
    ) -> MaskSlots:
        """Return the mask slots of these rows; one slot of the first row if there are none.

        Args:
            rows: By depth from 2 on, flat slots of the rows on the device of the batch, and on the CPU.
            few: Add slots that nothing reads, so that their number is one of few.
        """
        deepest = max(rows)
        if not any(len(on_host) for _, on_host in rows.values()):
            # A process without trained rows runs the same modules as the others, on the smallest input.
            few_rows = {depth: int(depth == 2) for depth in rows}
            rows = {
                depth: (parts[0].new_zeros(few_rows[depth]), parts[1].new_zeros(few_rows[depth]))
                for depth, parts in rows.items()
            }
        order_M, row_M, ahead_M = _sorted({depth: parts[0] for depth, parts in rows.items()}, deepest)
        _, on_host, _ = _sorted({depth: parts[1] for depth, parts in rows.items()}, deepest)
        place_M = torch.arange(len(row_M), device=row_M.device)
        sizes = [len(on_host) for _, on_host in rows.values()]
        of_depth = dict(zip(rows, torch.empty_like(order_M).index_copy(0, order_M, place_M).split(sizes), strict=True))
        after_E = torch.arange(1, deepest, device=row_M.device)
        later_ME = after_E > ahead_M[:, None]
        own_ME = torch.where(later_ME, place_M[:, None], place_M[:, None] - ahead_M[:, None] + after_E)
        hidden_M1K = torch.nn.functional.pad(later_ME, (1, 0))[:, None]
        more = few_sizes(len(row_M)) - len(row_M) if few else 0
        row_M, on_host, ahead_M, own_ME, hidden_M1K = (
            torch.cat([part, part[-1:].expand(more, *part.shape[1:])]) if more else part
            for part in (row_M, on_host, ahead_M, own_ME, hidden_M1K)
        )
        return cls(Blocks.of(row_M, documents, on_host=on_host), ahead_M, own_ME, hidden_M1K, of_depth)

    @classmethod
    def every(
        cls, first: int, last: int, documents: PackedDocuments, *, num_depths: int, device: torch.device
    ) -> MaskSlots:
        """Return the mask slots of all depths of the rows from flat slot `first` to before `last`."""
        on_host = torch.arange(first, last)
        rows_N = on_host.to(device)
        return cls.of(dict.fromkeys(range(2, num_depths + 1), (rows_N, on_host)), documents)


def _sorted(rows: Mapping[int, Tensor], deepest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (order_M, row_M, ahead_M): the slots of all depths, sorted by row and then by depth."""
    row_M = torch.cat(list(rows.values()))
    ahead_M = torch.cat([torch.full_like(found, depth - 1) for depth, found in rows.items()])
    order_M = (row_M * deepest + ahead_M).argsort()
    return order_M, row_M[order_M], ahead_M[order_M]
