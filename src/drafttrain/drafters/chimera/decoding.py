"""Chimera as decoding runs it: the trigram encoder and the layer on plain tensors, with the cache.

B = sequences, N = known slots of one call (the longest sequence's), M = newer tokens of one call (the longest sequence's), P = N + M,
D = hidden, X = what a head reads (2 D), R = the drafter's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters.chimera.rollout import ChimeraLayers
from drafttrain.drafters.decoding_layer import attend
from drafttrain.drafters.eagle.cache import EagleCache, Path
from drafttrain.drafters.eagle.decoding import padded
from drafttrain.drafters.few_rows import product_with
from drafttrain.drafters.medusa.blocks import ResidualBlocks
from drafttrain.drafters.tree_draft import DraftNode


class ChimeraModel(ChimeraLayers, Protocol):
    """What decoding needs of the drafter."""

    draft: str
    """See `Drafter.draft`."""
    lm_heads: nn.ModuleList
    fc: nn.Linear
    blocks: ResidualBlocks

    @property
    def num_steps(self) -> int:
        """Draft tokens of a round."""
        ...

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the drafter's vocabulary; None: the vocabularies are the same."""
        ...

    @property
    def embedding_row_bytes(self) -> int:
        """Bytes of one row of the target's embedding."""
        ...

    @property
    def finish_logits(self) -> Callable[[Tensor], Tensor] | None:
        """The elementwise scale or soft cap of the target's logits."""
        ...

    def needs(self) -> TargetNeeds:
        """Return what is read from the target."""
        ...

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_BTD from the target's outputs."""
        ...


@dataclass(frozen=True)
class Newer:
    """A token that the target has not read: the root of a round, or a draft token."""

    trigram: list[int]
    path: Path
    ahead: int
    """Places after the last known slot, from 0."""


class DecodingChimera:
    """The layer and the heads, with weights prepared once: later changes of the model do not reach it.

    The cache has keys and values of the target's features. Those of newer tokens exist for one round.
    """

    def __init__(self, model: ChimeraModel, *, device: torch.device) -> None:
        self.cache = EagleCache(0)
        self._model = model
        self._device = device
        self._layer = model.layer.decoding()
        self._heads = [product_with([head]) for head in model.lm_heads]
        self._newer: list[list[Newer]] = []
        """By sequence, the newer tokens in the order of reading, the root first."""

    def begin(self, num_sequences: int) -> None:
        """Empty the cache for new sequences."""
        self.cache = EagleCache(num_sequences)
        self._newer = [[] for _ in range(num_sequences)]

    def num_newer(self) -> list[int]:
        """Return the newer tokens read so far, by sequence."""
        return [len(newer) for newer in self._newer]

    def forget_newer(self) -> None:
        """Drop all newer tokens."""
        self.cache.forget_drafts()
        self._newer = [[] for _ in self._newer]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self.cache.select(keep)
        self._newer = [[] for _ in keep]

    def read_known(self, features_BND: Tensor, sizes: Sequence[int]) -> None:
        """Read the target's features of the next slots into the cache.

        Args:
            sizes: Slots of each sequence; may be 0 for some.
        """
        self._read(features_BND, sizes, [[] for _ in sizes])

    def read_roots(self, features_BND: Tensor, sizes: Sequence[int], trigrams: Sequence[list[int] | None]) -> Tensor:
        """Read the target's features of the next slots into the cache, and the roots after them; return states_B1D.

        Args:
            trigrams: Of the root of each sequence; None: it takes no part.
        """
        first = self.cache.num_draft_columns
        new = [[] if trigram is None else [Newer(trigram, [first], 0)] for trigram in trigrams]
        return self._read(features_BND, sizes, new)

    def read_drafts(self, frontiers: Sequence[Sequence[DraftNode]]) -> Tensor:
        """Read draft tokens, each attending to its own path; return states_BMD."""
        first = self.cache.num_draft_columns
        new = [
            [
                # The root was read before the draft tokens.
                Newer(
                    [*(parent := before[node.parent + 1]).trigram[1:], node.token],
                    [*parent.path, first + place],
                    node.depth,
                )
                for place, node in enumerate(frontier)
            ]
            for frontier, before in zip(frontiers, self._newer, strict=True)
        ]
        width = self._model.fc.out_features
        none_B0D = torch.empty(len(new), 0, width, dtype=self._model.fc.weight.dtype, device=self._device)
        return self._read(none_B0D, [0] * len(new), new)

    def head(self, read_NX: Tensor, depths: Sequence[int]) -> Tensor:
        """Return logits_NR; each row has the head of its depth."""
        numbers = [min(depth, len(self._heads)) - 1 for depth in depths]
        used = sorted(set(numbers))
        if len(used) == 1:
            logits_NR = self._heads[used[0]](read_NX)
        else:
            rows = [[row for row, number in enumerate(numbers) if number == head] for head in used]
            order_N = torch.tensor([row for of in rows for row in of]).to(read_NX.device)
            parts = read_NX.index_select(0, order_N).split([len(of) for of in rows])
            made_NR = torch.cat([self._heads[head](part) for head, part in zip(used, parts, strict=True)])
            logits_NR = torch.empty_like(made_NR).index_copy(0, order_N, made_NR)
        finish = self._model.finish_logits
        return logits_NR if finish is None else finish(logits_NR)

    def _read(self, features_BND: Tensor, sizes: Sequence[int], new: Sequence[Sequence[Newer]]) -> Tensor:
        """Return states_BMD of newer tokens."""
        num_known, width = features_BND.shape[1], max(map(len, new))
        starts = list(self.cache.lengths)
        positions = [
            [*range(start, start + num_known), *padded([start + size + one.ahead for one in of], width)]
            for start, size, of in zip(starts, sizes, new, strict=True)
        ]
        trigrams = [[*(one.trigram for one in of), *[[0, 0, 0]] * (width - len(of))] for of in new]
        # One copy to the device for both.
        numbers = [[*own, *(token for one in of for token in one)] for own, of in zip(positions, trigrams, strict=True)]
        numbers_BY = torch.tensor(numbers).to(self._device)
        positions_BP, tokens_BM3 = numbers_BY[:, : num_known + width], numbers_BY[:, num_known + width :]
        newer_BMD = self._model.trigram_states(tokens_BM3.unflatten(1, (width, 3)))
        inputs_BPD, stream_BPD = self._model.layer.entering(torch.cat([features_BND, newer_BMD], dim=1))
        query, key, value = self._layer.project(inputs_BPD, positions_BP, last=max(map(max, positions)))
        if num_known:
            self.cache.commit(key[:, :, :num_known], value[:, :, :num_known], sizes)
        if not width:
            return newer_BMD
        keys, values = self.cache.add_drafts(key[:, :, num_known:], value[:, :, num_known:])
        for before, of in zip(self._newer, new, strict=True):
            before += of
        allowed_BMC = self.cache.allowed_on_paths([[one.path for one in of] for of in new], width=width)
        on_device = None if allowed_BMC is None else allowed_BMC.to(self._device)
        return self._layer.finish(attend(query[:, :, num_known:], keys, values, on_device), stream_BPD[:, num_known:])
