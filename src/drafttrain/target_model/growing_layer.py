"""A key-value cache with preallocated memory: new tokens are written in place instead of concatenated to a copy.

B = sequences, G = key-value heads, C = columns, d = width of a head
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

COLUMNS_AT_ONCE = 64
"""Memory is allocated in multiples of this many columns."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a Hugging Face cache. `keys` and `values` are views of the used columns.

    It grows by an eighth, rounded up to a multiple of 64 columns, so at most that much is unused. Unused columns are 0: a
    masked column has weight 0 in the softmax, but 0 times a NaN would be NaN.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._taken: list[Tensor] = []
        """[keys, values] with unused columns; empty before the first call."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set type and device, with no columns yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._taken = [
            states.new_zeros(*states.shape[:-2], 0, states.shape[-1]) for states in (key_states, value_states)
        ]
        self.is_initialized = True
        self.show(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns after the used ones; return all used ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, count = self.keys.shape[-2], key_states.shape[-2]
        self.reserve(begin + count)
        for taken, states in zip(self._taken, (key_states, value_states), strict=True):
            taken.narrow(-2, begin, count).copy_(states)
        self.show(begin + count)
        return self.keys, self.values

    def reserve(self, columns: int) -> None:
        """Allocate at least this many columns; used ones keep their contents."""
        if columns <= self._taken[0].shape[-2]:
            return
        used = self.keys.shape[-2]
        room = _whole(max(columns, used + used // 8))
        # One after the other, so that only one of them exists twice at a time.
        for index, states in enumerate(self._taken):
            grown = states.new_zeros(*states.shape[:-2], room, states.shape[-1])
            grown.narrow(-2, 0, used).copy_(states.narrow(-2, 0, used))
            self._taken[index] = grown
            self.show(used)

    def show(self, columns: int) -> None:
        """Make the first `columns` columns the used ones."""
        self.keys, self.values = (states.narrow(-2, 0, columns) for states in self._taken)

    def move(self, columns_BW: Tensor, *, first: int) -> None:
        """Copy each sequence's columns `columns_BW` to its columns `first`, `first` + 1, ..."""
        for states in self._taken:
            index = columns_BW[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            states.narrow(2, first, columns_BW.shape[1]).copy_(states.gather(2, index))

    def select_by_head(self, columns_BGW: Tensor) -> None:
        """Keep only these columns of every sequence and head, in order."""
        columns = columns_BGW.shape[2]
        for index, states in enumerate(self._taken):
            kept = states.new_zeros(*states.shape[:2], _whole(columns), states.shape[3])
            kept.narrow(2, 0, columns).copy_(
                states.gather(2, columns_BGW[..., None].expand(-1, -1, -1, states.shape[3]))
            )
            self._taken[index] = kept
            self.show(0)
        self.show(columns)

    def select(self, rows_B: Tensor, columns_BW: Tensor) -> None:
        """Keep only these sequences and these columns of each, in order."""
        columns = columns_BW.shape[1]
        for index, states in enumerate(self._taken):
            kept = states.new_zeros(len(rows_B), states.shape[1], _whole(columns), states.shape[3])
            # One copy selects rows and columns.
            kept.narrow(2, 0, columns).copy_(states.transpose(1, 2)[rows_B[:, None], columns_BW].transpose(1, 2))
            self._taken[index] = kept
            self.show(0)
        self.show(columns)


class LayerBeside(GrowingLayer):
    """New columns after those of another layer, in the same memory. What the other layer uses is read, never copied or written."""

    def __init__(self, other: GrowingLayer) -> None:
        super().__init__()
        self._other = other
        self._taken = other._taken  # one list: memory that grows here has grown there
        self.dtype, self.device, self.is_initialized = other.dtype, other.device, True
        self.show(other.keys.shape[-2])

    def reserve(self, columns: int) -> None:
        """Allocate at least this many columns, for both layers."""
        super().reserve(columns)
        self._other.show(self._other.keys.shape[-2])


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A Hugging Face cache of growing layers.

    Without a configuration every layer stores all columns. Models with a sliding window mask the old ones themselves.

    Args:
        layers: Of another cache, which this one shares; None: none yet.
        first: What models ask for is the length of this layer, or of later ones.
    """

    def __init__(self, layers: list[Any] | None = None, *, first: int = 0) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
        self.first = first
        if layers is not None:
            self.layers = layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(max(layer_idx, self.first)))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, max(layer_idx, self.first))
        return sizes

    def beside(self, without: Collection[int]) -> GrowingCache:
        """Return a cache that reads this one and writes after its columns (see `LayerBeside`).

        Args:
            without: Layers that no call reads: these have no keys and values there.
        """
        cache, layers = GrowingCache(), cast(list[GrowingLayer], self.layers)
        cache.layers = [
            LayerBeside(layer) if layer.is_initialized and number not in without else GrowingLayer()
            for number, layer in enumerate(layers)
        ]
        return cache


def _whole(columns: int) -> int:
    """Return the next multiple of COLUMNS_AT_ONCE."""
    return -(-columns // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
