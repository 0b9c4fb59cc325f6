"""An EAGLE drafter as decoding runs it: the layer on plain tensors, with its cache.

B = sequences, N = slots or draft tokens of one call (the longest sequence's), D = hidden, C = columns of the cache,
P = columns of draft tokens, R = the drafter's vocabulary, F = rows with a frontier node
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drafttrain.drafters.decoding_layer import attend
from drafttrain.drafters.eagle.cache import EagleCache, Path
from drafttrain.drafters.eagle.model import EagleModel
from drafttrain.drafters.tree_draft import DraftNode


class DecodingEagle:
    """The layer and the head, with weights prepared once: later changes of the model do not reach it."""

    def __init__(self, model: EagleModel, *, device: torch.device) -> None:
        self.head: Callable[[Tensor], Tensor] = model.decoding_head()
        self.cache = EagleCache(0)
        self._model = model
        self._device = device
        self._layer = model.layer.decoding()
        self._paths: list[list[Path]] = []
        """By sequence, the paths of its draft tokens in the order of reading."""

    def begin(self, num_sequences: int) -> None:
        """Empty the cache for new sequences."""
        self.cache = EagleCache(num_sequences)
        self._paths = [[] for _ in range(num_sequences)]

    def read_slots(self, tokens: Sequence[Sequence[int]], features_BNF: Tensor) -> Tensor:
        """Read the next committed slots of every sequence into the cache; return states_BND.

        Args:
            tokens: By sequence, the token after each slot; may be empty for some.
        """
        width, starts = features_BNF.shape[1], list(self.cache.lengths)
        positions = [range(start, start + width) for start in starts]

        def commit(key_BGNd: Tensor, value_BGNd: Tensor) -> tuple[Tensor, Tensor]:
            return self.cache.commit(key_BGNd, value_BGNd, [len(one) for one in tokens])

        def allowed() -> Tensor | None:
            if width == 1 and self.cache.is_full:
                return None
            return self.cache.committed_before(starts, width=width)

        return self._read(tokens, positions, self._model.fused(features_BNF), commit, allowed)

    def read_drafts(self, frontiers: Sequence[Sequence[DraftNode]]) -> Tensor:
        """Read draft tokens after the committed slots, each attending to its own path; return states_BND."""
        width, first = max(map(len, frontiers)), self.cache.num_draft_columns
        paths = [
            [[*(before[node.parent] if node.parent >= 0 else ()), first + place] for place, node in enumerate(frontier)]
            for frontier, before in zip(frontiers, self._paths, strict=True)
        ]
        for before, new in zip(self._paths, paths, strict=True):
            before += new
        states_FD = torch.stack([node.state_D for of in frontiers for node in of if node.state_D is not None])
        tokens = [[node.token for node in frontier] for frontier in frontiers]
        positions = [
            padded([length - 1 + node.depth for node in frontier], width)
            for length, frontier in zip(self.cache.lengths, frontiers, strict=True)
        ]
        hidden_BND = _by_sequence(self._model.fed_back(states_FD), [len(one) for one in tokens], width)
        return self._read(
            tokens,
            positions,
            hidden_BND,
            self.cache.add_drafts,
            lambda: self.cache.allowed_on_paths(paths, width=width),
        )

    def num_drafts(self) -> list[int]:
        """Return the draft tokens read so far, by sequence."""
        return [len(paths) for paths in self._paths]

    def forget_drafts(self) -> None:
        """Drop all draft tokens."""
        self.cache.forget_drafts()
        self._paths = [[] for _ in self._paths]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self.cache.select(keep)
        self._paths = [[] for _ in keep]

    def _read(
        self,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        hidden_BND: Tensor,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        allowed: Callable[[], Tensor | None],
    ) -> Tensor:
        """Return states_BND of the layer.

        Args:
            store: Writes new keys and values into the cache; returns those of all columns.
            allowed: Returns allowed_BNC once they are stored; None: every query attends to all columns.
        """
        width = hidden_BND.shape[1]
        # One copy to the device for both.
        placed = [[padded(one, width) for one in tokens], [list(one) for one in positions]]
        tokens_BN, positions_BN = torch.tensor(placed).to(self._device)
        embedded_BND = self._model.embed_at(tokens_BN, positions_BN)
        inputs_BNX, residual_BND = self._model.entering(embedded_BND, hidden_BND)
        query, key, value = self._layer.project(inputs_BNX, positions_BN, last=max(map(max, positions)))
        keys, values = store(key, value)
        allowed_BNC = allowed()
        attended = attend(query, keys, values, None if allowed_BNC is None else allowed_BNC.to(self._device))
        return self._layer.finish(attended, residual_BND)


def rows_at(states_BND: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """Return the rows at (sequence, node): a slice if they are consecutive, else with one copy of the index."""
    width = states_BND.shape[1]
    flat = [number * width + node for number, node in places]
    if flat[-1] - flat[0] == len(flat) - 1:
        return states_BND.flatten(0, 1)[flat[0] : flat[-1] + 1]
    return states_BND.flatten(0, 1).index_select(0, torch.tensor(flat).to(states_BND.device))


def padded(numbers: Sequence[int], width: int) -> list[int]:
    """Return the numbers, followed by zeros."""
    return [*numbers, *[0] * (width - len(numbers))]


def _by_sequence(rows_FD: Tensor, sizes: Sequence[int], width: int) -> Tensor:
    """Return the rows of all sequences as a padded batch."""
    if min(sizes) == width:
        return rows_FD.unflatten(0, (len(sizes), width))
    batch_BND = rows_FD.new_zeros(len(sizes), width, rows_FD.shape[-1])
    for row, part_ND in enumerate(rows_FD.split(list(sizes))):
        batch_BND[row, : len(part_ND)] = part_ND
    return batch_BND
