"""The context of decoding: keys and values of the text that the target has read, by layer, and those of the block in one pass.

S = sequences, N = new positions of one call, B = slots of a block, C = columns of the context, H = heads, G = key-value heads,
d = width of a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.drafters.decoding_layer import attend
from drafttrain.drafters.dflash.layer import Attend
from drafttrain.drafters.eagle.cache import EagleCache


class ContextCache:
    """Column j of a sequence belongs to its token j and is computed once. Columns of a block exist for one pass."""

    def __init__(self, num_layers: int, num_sequences: int) -> None:
        self._layers = [EagleCache(num_sequences) for _ in range(num_layers)]

    @property
    def lengths(self) -> list[int]:
        """Columns of the context by sequence: the position of the next root."""
        return self._layers[0].lengths

    def append(self, context: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> None:
        """Append the first `size` new positions of every sequence.

        Args:
            context: By layer, (keys_SGNd, values_SGNd).
        """
        for layer, (keys_SGNd, values_SGNd) in zip(self._layers, context, strict=True):
            layer.commit(keys_SGNd, values_SGNd, sizes)

    def attend(self, lengths_S: Tensor, num_slots: int, *, causal: bool) -> list[Attend]:
        """Return, by layer, how the slots of a block attend: to the context and to each other.

        Args:
            lengths_S: `lengths`, on the device.
        """
        allowed_SBC = self._allowed(lengths_S, num_slots, causal=causal)

        def of(layer: EagleCache) -> Attend:
            def attended(query_SHBd: Tensor, key_SGBd: Tensor, value_SGBd: Tensor) -> Tensor:
                columns = layer.add_drafts(key_SGBd, value_SGBd)
                layer.forget_drafts()
                return attend(query_SHBd, *columns, allowed_SBC)

            return attended

        return [of(layer) for layer in self._layers]

    def _allowed(self, lengths_S: Tensor, num_slots: int, *, causal: bool) -> Tensor | None:
        """Return allowed_SBC; None: every slot attends to all columns."""
        first = self._layers[0]
        if first.is_full and not causal:
            return None
        context_SC = torch.arange(first.width, device=lengths_S.device) < lengths_S[:, None]
        own_BB = torch.ones(num_slots, num_slots, dtype=torch.bool, device=lengths_S.device)
        own_BB = own_BB.tril() if causal else own_BB
        parts = (context_SC[:, None].expand(-1, num_slots, -1), own_BB.expand(len(lengths_S), -1, -1))
        return torch.cat(parts, dim=-1)

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        for layer in self._layers:
            layer.select(sequences)

    def bytes_per_column(self) -> int:
        """Return the bytes of a column of one sequence, all layers; 0 before the first call."""
        return sum(layer.bytes_per_slot() for layer in self._layers)
