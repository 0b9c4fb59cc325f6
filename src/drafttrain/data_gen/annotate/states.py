"""The target's hidden states that a judge reads.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.groups import groups
from drafttrain.data_gen.packing import pack


@torch.no_grad()
def states_of(records: Sequence[Record], frozen: Frozen) -> list[Tensor]:
    """Return the float32 states_TD of each text at the layer that the judge reads."""
    found: dict[int, Tensor] = {}
    for group in groups([len(record.tokens) for record in records]):
        part = [records[i] for i in group]
        batch, places = pack(part, width=max(len(record.tokens) for record in part), weight_of_step=1.0)
        batch = batch.to(frozen.target.device)
        seen = frozen.target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(frozen.layer,)))
        states_BTD = seen.hidden_BTD[frozen.layer].float().cpu()
        for number, record, (row, column) in zip(group, part, places, strict=True):
            found[number] = states_BTD[row, column : column + len(record.tokens)]
    return [found[number] for number in range(len(records))]
