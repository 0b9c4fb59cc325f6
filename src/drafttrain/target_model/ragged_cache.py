"""A Hugging Face key-value cache for sequences of different lengths, which can be rolled back to the accepted nodes.

B = sequences, C = columns of the cache, N = nodes of one call (the longest sequence's), W = columns kept
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.growing_layer import GrowingCache

Tree = Sequence[int]
"""The parent of every node of a call, as its number among the pending tokens; -1: the last token that was kept.

Tokens are pending from the call that reads them to the next `keep`. If none were, a chain is -1, 0, 1, ...
"""


def is_chain(parents: Tree, *, after: int = 0) -> bool:
    """Return whether every node is the child of the one before it, the first one of the last of `after` pending tokens."""
    return all(parent == index - 1 for index, parent in enumerate(parents, start=after))


def depths(parents: Tree) -> list[int]:
    """Return the depth of every node below the cached text; a direct child has depth 0."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def ancestors(parents: Tree) -> Tensor:
    """Return allowed_NN: the nodes that each node may attend to, including itself."""
    paths: list[list[int]] = []
    for index, parent in enumerate(parents):
        paths.append([*paths[parent], index] if parent >= 0 else [index])
    allowed_NN = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    if paths:
        rows = [index for index, path in enumerate(paths) for _ in path]
        allowed_NN[rows, [node for path in paths for node in path]] = True
    return allowed_NN


def padded_rows(rows: Sequence[Tensor], width: int) -> Tensor:
    """Return the rows_ND of all sequences as a padded batch."""
    return torch.stack([pad(row_ND, (0, 0, 0, width - len(row_ND))) for row_ND in rows])


def additive_mask(allowed_BNC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mask_B1NC: 0 where a node may attend, else the lowest number of this type."""
    mask_BNC = torch.zeros(allowed_BNC.shape, dtype=dtype, device=allowed_BNC.device)
    return mask_BNC.masked_fill_(~allowed_BNC, torch.finfo(dtype).min)[:, None]


class RaggedCache:
    """The cached tokens of B sequences. Tokens read since the last `keep` are pending.

    After `keep` every sequence fills the columns from the left. If all lengths are equal there is no mask, and rolling back
    is a slice. The host knows the contents of the columns; a call copies what it needs to the device once.

    Args:
        layers: The layers it manages, if a model's blocks do not all read their tokens in the same calls.
        after: The Hugging Face cache with the layers before those.
        positions: By sequence, the positions of its first tokens; the last one given counts on: a token more than there are tokens
            to read says where the texts continue. None: 0, 1, 2, ...
    """

    def __init__(
        self,
        num_sequences: int,
        *,
        layers: slice = slice(None),
        after: GrowingCache | None = None,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._given: list[Sequence[int]] = [()] * num_sequences if positions is None else list(positions)
        self.hf = GrowingCache() if after is None else GrowingCache(after.layers, first=layers.start)
        self.managed = layers
        """The layers that it manages."""
        self.lengths = [0] * num_sequences
        """Cached tokens by sequence, including pending ones."""
        self.kept = [0] * num_sequences
        """Cached tokens by sequence at the last `keep`."""
        self._pending: list[list[int]] | None = None
        """By sequence, the parents of the pending tokens (see `Tree`); None: all of them form chains."""
        self.columns = 0
        """Columns in use, including pending tokens and padding."""
        self._real_BC: Tensor | None = None
        """Which columns contain a token; None: all do."""

    def trees(self, sizes: Sequence[int], parents: Sequence[Tree] | None) -> list[Tree | None]:
        """Return the tree of each sequence's new nodes; None: they go on in a chain, as all pending tokens do."""
        pending = [length - kept for length, kept in zip(self.lengths, self.kept, strict=True)]
        if parents is None:
            if self._pending is None:
                return [None] * len(sizes)
            parents = [range(after - 1, after - 1 + size) for after, size in zip(pending, sizes, strict=True)]
        if self._pending is None and all(is_chain(tree, after=n) for tree, n in zip(parents, pending, strict=True)):
            return [None] * len(sizes)
        return list(parents)

    def positions(self, sizes: Sequence[int], trees: Sequence[Tree | None], *, width: int) -> Tensor:
        """Return the position of every node; 0 for padding."""
        rows = []
        for row, (length, size, tree) in enumerate(zip(self.lengths, sizes, trees, strict=True)):
            own = list(range(length, length + size))
            if tree is not None:
                before = self._before(row)
                own = [self.kept[row] + depth for depth in depths([*before, *tree])[len(before) :]]
            rows.append([*(self._position(row, place) for place in own), *[0] * (width - size)])
        return torch.tensor(rows)

    def allowed(self, trees: Sequence[Tree | None], *, width: int) -> Tensor | None:
        """Return which columns, then nodes, each node may attend to; None: plain causal attention is right."""
        if self._real_BC is None and all(tree is None for tree in trees):
            return None
        allowed_BNC = torch.ones(len(trees), width, self.columns + width, dtype=torch.bool)
        if self._real_BC is not None:
            allowed_BNC[:, :, : self.columns] = self._real_BC[:, None]
        new_BNN = allowed_BNC[:, :, self.columns :]
        new_BNN.tril_()
        for row, tree in enumerate(trees):
            if tree:
                before = self._before(row)
                columns = [*self._pending_columns(row), *range(self.columns, self.columns + len(tree))]
                allowed_BNC[row, : len(tree), columns] = ancestors([*before, *tree])[len(before) :]
        return allowed_BNC

    def appended(self, sizes: Sequence[int], trees: Sequence[Tree | None] = (), *, width: int) -> None:
        """Register the nodes that a call of the model has just added to the layers."""
        self._check_layers(width)
        if any(tree is not None for tree in trees):
            self._pending = [[*self._before(row), *(tree or ())] for row, tree in enumerate(trees)]
        if self._real_BC is not None or min(sizes) < width:
            new_BN = torch.arange(width) < torch.tensor(sizes)[:, None]
            self._real_BC = torch.cat([self._real(), new_BN], dim=1)
        self.columns += width
        self.lengths = [length + size for length, size in zip(self.lengths, sizes, strict=True)]

    def commit(self) -> None:
        """Keep all pending tokens, as after a prefill."""
        assert self._pending is None, "of a tree only a path can be kept"
        self.kept = list(self.lengths)

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these pending tokens of every sequence, in order, and drop the others."""
        lengths = [kept + len(chosen) for kept, chosen in zip(self.kept, nodes, strict=True)]
        width = max(lengths)
        prefix = all(chosen[-1] == len(chosen) - 1 for chosen in nodes if chosen)
        if self._real_BC is not None or not prefix:
            self._gather(nodes, width=width)
        for layer in self._layers():
            layer.show(width)
        self.lengths = lengths
        self.kept = list(lengths)
        self._pending = None
        self._fit(width)

    def cut(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of every sequence, also of those that were kept before."""
        self.kept = [min(kept, length) for kept, length in zip(self.kept, lengths, strict=True)]
        self.keep([range(length - kept) for kept, length in zip(self.kept, lengths, strict=True)])

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order; nothing may be pending."""
        assert self.lengths == self.kept, "keep or drop the pending tokens before sequences are dropped"
        self.lengths = [self.lengths[i] for i in sequences]
        self._given = [self._given[i] for i in sequences]
        self.kept = list(self.lengths)
        width = max(self.lengths, default=0)
        rows_B = torch.tensor(list(sequences), dtype=torch.long)
        # Tokens kept by `commit` may still be to the right of padding.
        columns_BW = torch.arange(width)[None] if self._real_BC is None else self._order()[rows_B, :width]
        for layer in self._layers():
            # One copy if all layers are on one device.
            rows_B, columns_BW = rows_B.to(layer.device), columns_BW.to(layer.device)
            layer.select(rows_B, columns_BW)
        self._fit(width)

    def beside(
        self,
        without: Collection[int] = (),
        *,
        visible: Sequence[int] | None = None,
        layers: slice = slice(None),
    ) -> RaggedCache:
        """Return a cache for tokens that are read after the kept ones and never kept: this one stays as it is.

        Its columns are unused ones of the same memory. It is valid until this cache is changed.

        Args:
            without: Layers that no call reads.
            visible: By sequence, the first cached tokens that the new ones follow and attend to; None: all.
            layers: Those that calls read.
        """
        assert self.lengths == self.kept, "keep or drop the pending tokens first"
        cache = RaggedCache(len(self.lengths), layers=layers, positions=self._given)
        cache.hf = self.hf.beside(without)
        cache.lengths = list(self.lengths if visible is None else visible)
        cache.kept, cache.columns = list(cache.lengths), self.columns
        cache._real_BC = self._real_BC
        if visible is not None and cache.lengths != self.lengths:
            places_BC = self._real().cumsum(dim=1)
            cache._real_BC = self._real() & (places_BC <= torch.tensor(cache.lengths)[:, None])
        return cache

    def reduce(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Keep only some keys and values of every head; nothing may be pending. Positions of later tokens stay as they are.

        Args:
            columns: By managed layer and sequence, columns_GW: the cached tokens that each key-value head keeps, ascending. All heads
                and layers keep the same number of a sequence's tokens.

        Raises:
            CheckpointError: The model has layers without keys and values of their own.
        """
        assert self.lengths == self.kept, "keep or drop the pending tokens first"
        layers = self._layers()
        if len(layers) != len(columns):
            raise CheckpointError(
                f"{len(columns) - len(layers)} of {len(columns)} layers read the keys of others: parts of a cache cannot be kept"
            )
        counts = [own_GW.shape[1] for own_GW in columns[0]]
        for layer, own in zip(layers, columns, strict=True):
            columns_BGW = torch.stack([pad(own_GW, (0, max(counts) - own_GW.shape[1])) for own_GW in own])
            layer.select_by_head(columns_BGW.to(layer.device))
        ends = [self._position(row, length) for row, length in enumerate(self.lengths)]
        self._given = [range(end - count, end + 1) for end, count in zip(ends, counts, strict=True)]
        self.lengths, self.kept = list(counts), list(counts)
        self._fit(max(counts))

    def continue_at(self, offsets: Sequence[int] | None) -> None:
        """Number later tokens of each text from this far beyond its number of tokens; None: as they are numbered."""
        if offsets is not None:
            self._given = [(offset,) for offset in offsets]

    def manage(self, layers: slice) -> None:
        """Manage other layers, which have the same tokens; nothing may be pending."""
        assert self.lengths == self.kept, "keep or drop the pending tokens first"
        self.managed, self.hf.first = layers, layers.start or 0

    @property
    def heads(self) -> list[int]:
        """Key-value heads of each layer."""
        return [layer.keys.shape[1] for layer in self._layers()]

    def bytes_per_token(self) -> int:
        """Return the bytes of one token of one sequence, over all layers; 0 before the first call."""
        return sum(
            state.shape[1] * state.shape[3] * state.element_size()
            for layer in self._layers()
            for state in (layer.keys, layer.values)
        )

    def _position(self, row: int, place: int) -> int:
        """Return the position of a sequence's token, counted from its first one."""
        given = self._given[row]
        return given[place] if place < len(given) else place + (given[-1] + 1 - len(given) if given else 0)

    def _gather(self, nodes: Sequence[Sequence[int]], *, width: int) -> None:
        """Move the chosen pending tokens of every row to the left, directly after the kept ones."""
        # Columns before `first` stay: they contain kept tokens of every row, without padding in between.
        first = min(*self.kept, int(self._real().all(dim=0).to(torch.uint8).cumprod(dim=0).sum()))
        token_BW = torch.arange(width).repeat(len(nodes), 1)
        for row, (kept, chosen) in enumerate(zip(self.kept, nodes, strict=True)):
            token_BW[row, kept : kept + len(chosen)] = kept + torch.tensor(list(chosen), dtype=torch.long)
        columns_BW = self._order().gather(1, token_BW)[:, first:]
        for layer in self._layers():
            columns_BW = columns_BW.to(layer.device)  # one copy if all layers are on one device
            layer.move(columns_BW, first=first)

    def _before(self, row: int) -> list[int]:
        """Return the parents of a sequence's pending tokens."""
        if self._pending is not None:
            return self._pending[row]
        return list(range(-1, self.lengths[row] - self.kept[row] - 1))

    def _pending_columns(self, row: int) -> list[int]:
        """Return the columns of a sequence's pending tokens, in the order in which they were read."""
        if self.lengths[row] == self.kept[row]:
            return []
        real_C = self._real()[row].nonzero()[:, 0]
        columns: list[int] = real_C[self.kept[row] :].tolist()
        return columns

    def _real(self) -> Tensor:
        """Return real_BC: which columns contain a token."""
        return torch.ones(len(self.lengths), self.columns, dtype=torch.bool) if self._real_BC is None else self._real_BC

    def _order(self) -> Tensor:
        """Return order_BC: the columns with tokens, in order, then the others."""
        return self._real().logical_not().to(torch.uint8).argsort(dim=1, stable=True)

    def _fit(self, width: int) -> None:
        ragged = min(self.lengths, default=0) < width
        self.columns = width
        self._real_BC = torch.arange(width) < torch.tensor(self.lengths)[:, None] if ragged else None

    def _layers(self) -> list[Any]:
        """Return the managed layers with states; a layer that shares another's states has none."""
        layers: list[Any] = list(self.hf.layers)[self.managed]
        return [layer for layer in layers if layer.is_initialized]

    def _check_layers(self, width: int) -> None:
        if self.columns:
            return
        for layer in self._layers():
            if layer.keys.ndim != 4 or layer.keys.shape[2] != width or layer.values.shape[2] != width:
                raise CheckpointError(
                    f"a {type(layer).__name__} does not store one key and value per token: this model's cache cannot be "
                    "rolled back"
                )
