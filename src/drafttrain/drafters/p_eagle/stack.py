"""The layers of P-EAGLE: the first one is EAGLE-3's, the others read the stream alone; and one layer over real rows or mask slots.

B = sequences, N = slots of all rows of a batch, one after another, M = mask slots, E = mask slots of a row at most, K = E + 1,
D = hidden, X = input width of a layer's projections, H = heads, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.drafters.dflash.attention import attend_blocks
from drafttrain.drafters.eagle.layer import EagleLayer, Norm
from drafttrain.drafters.p_eagle.slots import MaskSlots
from drafttrain.drafters.recomputing import run_part
from drafttrain.target_model.packed_attention import Columns

Entered = tuple[Tensor, Tensor]
"""(inputs_BNX of a layer's projections, the residual stream residual_BND)."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns attended_BHNd of (query_BHNd, key_BGNd, value_BGNd)."""


class DeepLayer(EagleLayer):
    """A layer after the first: it reads the residual stream through a norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, input_size=config.hidden_size)
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    def entering(self, stream_BND: Tensor) -> Entered:
        """Return the normed stream, and the stream itself."""
        normed_BND: Tensor = self.input_layernorm(stream_BND)
        return normed_BND, stream_BND


def run_layer(
    layer: EagleLayer, entered: Entered, positions_BN: Tensor, attend: Attend, *, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (stream_BND after the layer, key_BGNd, value_BGNd).

    Args:
        recompute: Store the layer's inputs only, and compute the rest again in the backward pass.
    """

    def run(inputs_BNX: Tensor, residual_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_BHNd, key_BGNd, value_BGNd = layer.project(inputs_BNX, positions_BN)
        return layer.finish(attend(query_BHNd, key_BGNd, value_BGNd), residual_BND), key_BGNd, value_BGNd

    return run_part(run, *entered, recompute=recompute)


def real_rows(documents: PackedDocuments) -> Attend:
    """Return the attention of real rows: to their document up to themselves."""

    def attend(query_1HNd: Tensor, key_1GNd: Tensor, value_1GNd: Tensor) -> Tensor:
        return Columns(key_1GNd, value_1GNd, documents).attend(query_1HNd)

    return attend


def mask_slots(slots: MaskSlots, keys_1GNd: Tensor, values_1GNd: Tensor) -> Attend:
    """Return the attention of mask slots: to the real rows of their document up to their own, and to the slots of their row up to them.

    Args:
        keys_1GNd: Of the real rows of this layer.
        values_1GNd: The same.
    """

    def own(real_1GNd: Tensor, masks_1GMd: Tensor) -> Tensor:
        """Return states_MGKd of each slot's own row: the real row, then its mask slots."""
        real_GMd = real_1GNd[0].index_select(1, slots.rows.slots_A)
        # A first layer has one value for all mask slots.
        masks_GMd = masks_1GMd[0].expand(-1, len(slots.ahead_M), -1)
        masks_GMEd = masks_GMd.index_select(1, slots.own_ME.flatten()).unflatten(1, slots.own_ME.shape)
        return torch.cat([real_GMd[:, :, None], masks_GMEd], dim=2).transpose(0, 1)

    def attend(query_1HMd: Tensor, key_1GMd: Tensor, value_1GMd: Tensor) -> Tensor:
        attended_MH1d = attend_blocks(
            query_1HMd[0].transpose(0, 1)[:, :, None],
            (own(keys_1GNd, key_1GMd), own(values_1GNd, value_1GMd)),
            (keys_1GNd[0], values_1GNd[0]),
            slots.rows,
            hidden_ABO=slots.hidden_M1K,
        )
        return attended_MH1d[:, :, 0].transpose(0, 1)[None]

    return attend
