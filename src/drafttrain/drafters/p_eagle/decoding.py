"""P-EAGLE as decoding runs it: all layers on plain tensors, each with its cache.

B = sequences, N = committed slots of one call (the longest sequence's), S = mask slots of a sequence, P = N + S, K = S + 1, C = columns of the
cache, D = hidden, X = input width of a layer's projections
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.drafters.decoding_layer import attend
from drafttrain.drafters.eagle.cache import EagleCache
from drafttrain.drafters.eagle.layer import EagleLayer
from drafttrain.drafters.eagle.model import EagleModel
from drafttrain.drafters.p_eagle.stack import DeepLayer, Entered


class PEagleModel(EagleModel, Protocol):
    """What decoding needs of a P-EAGLE drafter."""

    @property
    def each_layer(self) -> list[EagleLayer]:
        """The layers, in order."""
        ...

    @property
    def deep_layers(self) -> list[DeepLayer]:
        """The layers after the first."""
        ...

    @property
    def num_depths(self) -> int:
        """Draft tokens of one pass."""
        ...

    def mask_entering(self, device: torch.device) -> Entered:
        """Return (inputs_11X, residual_11D) of a mask slot."""
        ...


class DecodingPEagle:
    """The layers and the head, with weights prepared once: later changes of the model do not reach it.

    Keys and values of committed slots stay. Those of mask slots exist for one pass.
    """

    def __init__(self, model: PEagleModel, *, device: torch.device) -> None:
        self.head: Callable[[Tensor], Tensor] = model.decoding_head()
        self._model = model
        self._device = device
        self._layers = [layer.decoding() for layer in model.each_layer]
        self._deep = model.deep_layers
        self._mask: Entered = model.mask_entering(device)
        self._caches: list[EagleCache] = []

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    @property
    def lengths(self) -> list[int]:
        """Committed slots of each sequence."""
        return self._caches[0].lengths

    def begin(self, num_sequences: int) -> None:
        """Empty the caches for new sequences."""
        self._caches = [EagleCache(num_sequences) for _ in self._layers]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        for cache in self._caches:
            cache.select(keep)

    def bytes_per_slot(self) -> int:
        """Return the bytes of one slot of one sequence, all layers; 0 before the first call."""
        return sum(cache.bytes_per_slot() for cache in self._caches)

    def read(self, tokens: Sequence[Sequence[int]], features_BNF: Tensor, *, num_masks: int) -> Tensor:
        """Read the next committed slots of every sequence into the caches, and mask slots after them.

        Returns:
            states_BKD of the last of these committed slots, and of the mask slots.

        Args:
            tokens: By sequence, the token after each slot; may be empty for some.
            num_masks: Mask slots of every sequence.
        """
        width, starts = features_BNF.shape[1], list(self.lengths)
        sizes = [len(one) for one in tokens]
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        positions = [
            [*range(start, start + width), *range(end, end + num_masks)]
            for start, end in zip(starts, ends, strict=True)
        ]
        padded = [[*one, *[0] * (width + num_masks - len(one))] for one in tokens]
        predicting = [[max(0, size - 1), *range(width, width + num_masks), *[0] * (width - 1)] for size in sizes]
        # One copy to the device for all three.
        tokens_BP, positions_BP, places_BP = torch.tensor([padded, positions, predicting]).to(self._device)
        entered = self._entered(tokens_BP[:, :width], positions_BP[:, :width], features_BNF, num_masks)
        last = max(map(max, positions))
        allowed_BPC: Tensor | None = None
        for number, (layer, following, cache) in enumerate(zip_longest(self._layers, self._deep, self._caches)):
            query, key, value = layer.project(entered[0], positions_BP, last=last)
            keys, values = cache.commit(key[:, :, :width], value[:, :, :width], sizes)
            if num_masks:
                keys, values = cache.add_drafts(key[:, :, width:], value[:, :, width:])
                cache.forget_drafts()
            if not number:
                allowed_BPC = self._allowed(positions_BP, num_masks=num_masks)
            stream_BPD = layer.finish(attend(query, keys, values, allowed_BPC), entered[1])
            if following is not None:
                entered = following.entering(stream_BPD)
        places_BK1 = places_BP[:, : num_masks + 1, None]
        return stream_BPD.gather(1, places_BK1.expand(-1, -1, stream_BPD.shape[-1]))

    def _entered(self, tokens_BN: Tensor, positions_BN: Tensor, features_BNF: Tensor, num_masks: int) -> Entered:
        real = self._model.entering(self._model.embed_at(tokens_BN, positions_BN), self._model.fused(features_BNF))
        if not num_masks:
            return real
        inputs_BPX, residual_BPD = (
            torch.cat([of_real, of_mask.expand(len(of_real), num_masks, -1)], dim=1)
            for of_real, of_mask in zip(real, self._mask, strict=True)
        )
        return inputs_BPX, residual_BPD

    def _allowed(self, positions_BP: Tensor, *, num_masks: int) -> Tensor | None:
        """Return allowed_BPC: of committed slots the columns up to them, of mask slots all of the text and the mask slots up to them."""
        cache, width = self._caches[0], positions_BP.shape[1] - num_masks
        if positions_BP.shape[1] == 1 and cache.is_full:
            return None
        # The column of a committed slot is its position. The first mask slot stands where the text ends.
        columns_C = torch.arange(cache.width, device=positions_BP.device)
        real_BNC = columns_C <= positions_BP[:, :width, None]
        if not num_masks:
            return real_BNC
        text_BSC = (columns_C < positions_BP[:, width, None, None]).expand(-1, num_masks, -1)
        own_SS = torch.ones(num_masks, num_masks, dtype=torch.bool, device=positions_BP.device).tril()
        masks_BSC = torch.cat([text_BSC, own_SS.expand(len(positions_BP), -1, -1)], dim=-1)
        return torch.cat([torch.nn.functional.pad(real_BNC, (0, num_masks)), masks_BSC], dim=1)
