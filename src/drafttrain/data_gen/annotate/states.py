"""The target's states that a judge reads.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.core.records import Record, TargetNeeds
from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.packing import pack

TEXTS_AT_ONCE = 64


@torch.no_grad()
def states_of(records: Sequence[Record], frozen: Frozen) -> list[Tensor]:
    """Return states_TD of each text, of the layer that the judge reads, float32."""
    found: list[Tensor] = []
    for start in range(0, len(records), TEXTS_AT_ONCE):
        part = records[start : start + TEXTS_AT_ONCE]
        batch, places = pack(part, width=max(len(record.tokens) for record in part), weight_of_step=1.0)
        batch = batch.to(frozen.target.device)
        seen = frozen.target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(frozen.layer,)))
        states_BTD = seen.hidden_BTD[frozen.layer].float().cpu()
        found += [
            states_BTD[row, column : column + len(record.tokens)]
            for record, (row, column) in zip(part, places, strict=True)
        ]
    return found
