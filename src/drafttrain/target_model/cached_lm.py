"""A Hugging Face causal LM with a key-value cache over a list of sequences: one call reads all new tokens of all of them.

B = sequences, N = nodes of one call (the longest sequence's), V = vocabulary, D = hidden
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.images import Image
from drafttrain.core.proposals import LayerState
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.target_model.anatomy import taps, trunk
from drafttrain.target_model.block_range import block_range
from drafttrain.target_model.grouped_attention import GroupedAttention
from drafttrain.target_model.model_weights import ModelWeights
from drafttrain.target_model.part import Part, by_sequence
from drafttrain.target_model.positions import check_positions, position_limit
from drafttrain.target_model.ragged_cache import RaggedCache, Tree, additive_mask, padded_rows
from drafttrain.target_model.rolling_back import refuse_states_that_cannot_roll_back, window_of
from drafttrain.target_model.rows_beside import RowsBeside, read_with_rows
from drafttrain.target_model.sublayers import Skipped, Sublayers
from drafttrain.target_model.two_parts import refuse_if_not_same_in_two_parts

MASKED_ATTENTION = ("sdpa", "eager")


class CachedLM:
    """A causal LM and the cache of the sequences that it reads.

    `forward` reads new tokens, which are then pending; `keep` decides which of them stay in the cache. Calls with different
    padding differ by rounding: in float32 by about 1e-6.

    After `split_at` the first blocks can read tokens on their own (`run_first_blocks`), and `forward` continues from their
    states. Both calls use the same cache, and `keep` rolls back all blocks.
    """

    def __init__(self, model: Any, *, name: str, listener: ForwardListener | None = None) -> None:
        self.model = model
        self.name = name
        self.listener = listener
        self.device = next(model.parameters()).device
        self._config = model.config.get_text_config()
        self._window = window_of(self._config, name=name)
        refuse_states_that_cannot_roll_back(model, name=name)
        self._trunk = trunk(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._attention = GroupedAttention(model)
        self._position_limit = position_limit(model)
        self._weights = ModelWeights(model)
        self._num_layers = int(self._config.num_hidden_layers)
        self.split: int | None = None
        self.cache = RaggedCache(0)
        """The cache of all blocks, or of those from the split on."""
        self._first_cache: RaggedCache | None = None
        """The cache of the blocks before the split."""
        self.rows_beside: RowsBeside | None = None
        """Rows that a proposer adds to every call over trees."""

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache by sequence, including pending ones."""
        return self.cache.lengths

    @property
    def kept(self) -> list[int]:
        """Tokens in the cache by sequence at the last `keep`."""
        return self.cache.kept

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens are read one at a time, and without trees; None: no such limit."""
        attention = self._config._attn_implementation
        if attention not in MASKED_ATTENTION:
            return f"target.attention {attention} does not accept custom masks, {' and '.join(MASKED_ATTENTION)} do"
        if not self._takes_positions:
            return f"{type(self.model).__name__} takes no position_ids"
        if self._window is not None and longest >= self._window:
            return f"texts reach its sliding window of {self._window} tokens"
        return None

    def split_at(self, layer: int) -> None:
        """From now on, allow running blocks 0..layer-1 on their own.

        Raises:
            CheckpointError: This model's outputs change when it is run in two parts.
        """
        if not 1 <= layer < self._num_layers:
            raise CheckpointError(
                f"{self.name}: blocks can be split at 1..{self._num_layers - 1} ({self._num_layers} layers), got {layer}"
            )
        self.split = layer
        listener, self.listener = self.listener, None
        try:
            refuse_if_not_same_in_two_parts(self, takes_positions=self._takes_positions)
        finally:
            self.listener = listener

    def move_split(self, layer: int) -> None:
        """Between rounds, split at another block that `split_at` has tried. No key or value is copied."""
        assert self._first_cache is not None, "call split_at first, then begin"
        self.split = layer
        self._first_cache.manage(slice(layer))
        self.cache.manage(slice(layer, None))

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        needs: TargetNeeds | None = None,
        positions: Sequence[Sequence[int]] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[TargetOutput]:
        """Empty the cache and read these prompts, which may be empty. `positions`: see `RaggedCache`; images are refused here."""
        if images is not None and any(images):
            raise CheckpointError(
                f"{self.name}: a prompt has images, and this model reads text only: see target.images"
            )
        self._empty(len(prompts), positions)
        seen = self.forward(prompts, needs=needs or TargetNeeds(), prefill=True)
        for cache in self._caches():
            cache.commit()
        return seen

    def _empty(self, num_sequences: int, positions: Sequence[Sequence[int]] | None) -> None:
        made = partial(RaggedCache, num_sequences, positions=positions)
        self.cache = made()
        if self.split is not None:
            self._first_cache = made(layers=slice(self.split))
            self.cache = made(layers=slice(self.split, None), after=self._first_cache.hf)

    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        parents: Sequence[Tree] | None = None,
        needs: TargetNeeds | None = None,
        prefill: bool = False,
        resume: Sequence[LayerState | None] | None = None,
        embedded: Sequence[Tensor] | None = None,
    ) -> list[TargetOutput]:
        """Read new tokens of every sequence; return the requested outputs of each, as a batch of one.

        Args:
            tokens: Nodes by sequence; may be empty for some.
            parents: The tree of each sequence (see `Tree`); None: all are chains.
            needs: What to return; by default logits. Without logits the head does not run.
            prefill: The call reads prompts (reported to the listener).
            resume: The results of `run_first_blocks` for exactly these tokens, by sequence: the call continues from there.
            embedded: By sequence, embedded_ND that are read in place of the embeddings of its tokens; None: those.
        """
        states = [one for one in resume or () if one is not None]
        if states and (len(states) < len(tokens) or any(one.layer != self.split for one in states)):
            raise CheckpointError(
                f"{self.name}: a call must continue all of its sequences from block {self.split}, or none"
            )
        needs = needs or TargetNeeds(logits=True)
        passed = [index for index in needs.hidden if states and index < states[0].layer]
        if passed:
            raise CheckpointError(
                f"{self.name}: hidden state {passed[0]} is not available when a call continues from block {self.split}"
            )
        running = range(self.split if states and self.split else 0, self._num_layers)
        part = self._blocks(running, entering=[one.hidden_ND for one in states] or None)
        if self.rows_beside is not None and parents is not None:
            if self._has_room_for(self.rows_beside, tokens):
                read = partial(self._read, needs=needs, part=part)
                return read_with_rows(read, self.model, self.rows_beside, tokens, parents)
            self.rows_beside.receive([])
        return self._read(tokens, parents=parents, needs=needs, part=part, embedded=embedded, prefill=prefill)

    def run_first_blocks(self, tokens: Sequence[Sequence[int]], *, passed: Sequence[int] = ()) -> list[LayerState]:
        """Read new tokens with only the blocks before the split; return the states that enter the next block.

        The tokens are then pending. Before `keep`, `forward` must read the same tokens in the same order, resuming from
        these states.

        Args:
            passed: Earlier blocks; the states that enter these are returned too.
        """
        assert self.split is not None, "call split_at first"
        needs = TargetNeeds(hidden=(*passed, self.split))
        seen = self._read(tokens, parents=None, needs=needs, part=self._blocks(range(self.split)))
        rows = [{block: states[0] for block, states in one.hidden_BTD.items()} for one in seen if one.hidden_BTD]
        return [LayerState(self.split, own.pop(self.split), own) for own in rows]

    def read_beside(
        self,
        cache: RaggedCache,
        tokens: Sequence[Sequence[int]],
        *,
        sublayers: Sublayers,
        skipped: Skipped,
        parents: Sequence[Tree] | None = None,
        needs: TargetNeeds | None = None,
    ) -> list[TargetOutput]:
        """Read tokens after the kept ones, without some sublayers; the model's own cache stays as it is.

        Args:
            cache: Of these tokens: `self.cache.beside(skipped.attention)`.
        """
        part = Part(
            f"{self.name} {skipped.how}",
            caches=[cache],
            context=sublayers.without(skipped),
            num_layers=self._num_layers - len(skipped) // 2,
            without=self._weights.of_sublayers(*sublayers.modules(skipped)) + sublayers.neurons_left_out(skipped),
        )
        return self._read(tokens, parents=parents, needs=needs or TargetNeeds(logits=True), part=part)

    def read_again(
        self, tokens: Sequence[Sequence[int]], *, visible: Sequence[int], within: AbstractContextManager[None]
    ) -> None:
        """Run the blocks on tokens after the first kept ones, within a context; the model's own cache stays as it is.

        Args:
            visible: By sequence, the first cached tokens that the new ones follow and attend to.
        """
        beside = self.cache.beside(visible=visible)
        part = Part(f"{self.name} again", caches=[beside], context=within, num_layers=self._num_layers)
        self._read(tokens, parents=None, needs=TargetNeeds(), part=part)

    def read_last_blocks(
        self, entering: Sequence[Tensor | None], *, running: range, needs: TargetNeeds
    ) -> list[TargetOutput]:
        """Run some blocks on states of tokens after the kept ones; the model's own cache stays as it is.

        Args:
            entering: By sequence, states_ND that enter block `running.start`; None: it takes no part.
        """
        some = next(states for states in entering if states is not None)
        given = [some[:0] if states is None else states for states in entering]
        entering_BND = padded_rows(given, max(map(len, given)))
        part = Part(
            f"{self.name}'s last blocks",
            caches=[self.cache.beside(layers=slice(running.start, running.stop))],
            context=block_range(self.model, running, entering_BND=entering_BND),
            num_layers=len(running),
            running=running,
        )
        # The blocks before these do not run, so the tokens do not matter.
        return self._read([[0] * len(states) for states in given], parents=None, needs=needs, part=part)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read and keep one token of every sequence; return logits_BV after it."""
        new, part = [[token] for token in tokens], self._blocks(range(self._num_layers))
        output, _ = self._run(new, parents=None, needs=TargetNeeds(logits=True), part=part)
        self.cache.commit()
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these of each sequence's pending tokens (a path down the tree), and drop the others."""
        for cache in self._caches():
            cache.keep(nodes)

    def cut(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of each sequence, also of those that were kept before; all pending ones form chains."""
        for cache in self._caches():
            cache.cut(lengths)

    def reduce(self, columns: Sequence[Sequence[Tensor]]) -> None:
        """Keep only some keys and values of every head, by layer and sequence: see `RaggedCache.reduce`."""
        for cache in self._caches():
            cache.reduce(columns[cache.managed])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order. The others are finished."""
        for cache in self._caches():
            cache.select(keep)

    def _has_room_for(self, added: RowsBeside, tokens: Sequence[Sequence[int]]) -> bool:
        """Return whether rows after all nodes stay before the sliding window and within the position embeddings."""
        length, nodes, rows = max(self.lengths), max(map(len, tokens)), len(added.layers)
        if self.why_one_at_a_time(length + nodes * (1 + rows)):
            return False
        return self._position_limit is None or length + nodes + rows <= self._position_limit

    def _caches(self) -> list[RaggedCache]:
        return [self.cache] if self._first_cache is None else [self._first_cache, self.cache]

    def _blocks(self, running: range, *, entering: Sequence[Tensor] | None = None) -> Part:
        """Return the blocks of `running`, with the caches of both sides of the split, or of their own side."""
        caches, whole = self._caches(), len(running) == self._num_layers
        entering_BND = None if entering is None else padded_rows(entering, max(map(len, entering)))
        return Part(
            self.name if running.stop == self._num_layers else f"{self.name}'s first blocks",
            caches=caches if whole else caches[:1] if 0 in running else caches[1:],
            context=nullcontext() if whole else block_range(self.model, running, entering_BND=entering_BND),
            num_layers=len(running),
            running=running,
        )

    def _read(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        parents: Sequence[Tree] | None,
        needs: TargetNeeds,
        part: Part,
        embedded: Sequence[Tensor] | None = None,
        prefill: bool = False,
    ) -> list[TargetOutput]:
        """Read new tokens with a part of the model; return the requested outputs by sequence."""
        sizes = [len(nodes) for nodes in tokens]
        if not any(sizes):
            return [TargetOutput() for _ in tokens]
        output, seen = self._run(tokens, parents=parents, needs=needs, part=part, embedded=embedded, prefill=prefill)
        return by_sequence(output.logits if needs.logits else None, seen, sizes)

    @torch.no_grad()
    def _run(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        parents: Sequence[Tree] | None,
        needs: TargetNeeds,
        part: Part,
        embedded: Sequence[Tensor] | None = None,
        prefill: bool = False,
    ) -> tuple[Any, dict[int | str, Tensor]]:
        """Read new tokens with a part of the model; return the model's output and its hidden states, batched."""
        sizes = [len(nodes) for nodes in tokens]
        width = max(sizes)
        span = Span(self.device)
        trees = part.caches[0].trees(sizes, parents)
        tokens_BN = torch.tensor([[*nodes, *[0] * (width - len(nodes))] for nodes in tokens])
        positions_BN = self._positions(part.caches[0], sizes, trees)
        if self._takes_positions:
            check_positions(self.model, int(positions_BN.max()), limit=self._position_limit, name=self.name)
        # One copy to the device for both.
        tokens_BN, positions_BN = torch.stack([tokens_BN, positions_BN]).to(self.device)
        arguments: dict[str, Any] = {
            **({"input_ids": tokens_BN} if embedded is None else {"inputs_embeds": padded_rows(embedded, width)}),
            "attention_mask": self._mask(part.caches[0], trees, width),
        }
        if self._takes_positions:
            arguments["position_ids"] = positions_BN
        called = self.model if needs.logits else self._trunk
        return self._call(called, arguments, sizes, trees, needs, part, span, prefill)

    def _call(
        self,
        called: Any,
        arguments: dict[str, Any],
        sizes: Sequence[int],
        trees: Sequence[Tree | None],
        needs: TargetNeeds,
        part: Part,
        span: Span,
        prefill: bool,
    ) -> tuple[Any, dict[int | str, Tensor]]:
        """Call a model on new tokens of these sizes, and note them in the caches."""
        caches = part.caches
        tapped: Any = taps(self.model, needs) if needs.hidden or needs.final else nullcontext({})
        with tapped as seen, self._attention(), part.context:
            output = called(**arguments, past_key_values=caches[0].hf, use_cache=True)
        lengths = caches[0].lengths
        for cache in caches:
            cache.appended(sizes, trees, width=max(sizes))
        if self.listener is not None:
            head_rows = sum(sizes) if needs.logits else 0
            shape = ForwardShape.of(sizes, lengths, num_layers=part.num_layers, head_rows=head_rows)
            self.listener(self._event(shape, part, prefill=prefill, span=span.end()))
        return output, dict(seen)

    def _positions(self, cache: RaggedCache, sizes: Sequence[int], trees: Sequence[Tree | None]) -> Tensor:
        """Return the position of every node."""
        return cache.positions(sizes, trees, width=max(sizes))

    def _mask(self, cache: RaggedCache, trees: Sequence[Tree | None], width: int) -> Tensor | None:
        """Return the additive mask; None: the model's own causal mask is right. Trees and ragged batches need one."""
        allowed_BNC = cache.allowed(trees, width=width)
        if allowed_BNC is None:
            return None
        if why := self.why_one_at_a_time(allowed_BNC.shape[-1]):
            raise CheckpointError(f"{self.name}: {why}: decode one sequence at a time, in chains")
        return additive_mask(allowed_BNC.to(self.device), self.model.dtype)

    def _event(self, shape: ForwardShape, part: Part, *, prefill: bool, span: Span) -> ForwardEvent:
        cached, of_all = (sum(cache.bytes_per_token() for cache in some) for some in (part.caches, self._caches()))
        return ForwardEvent(
            model=part.name,
            shape=shape,
            work=self._weights.work(shape, cache_bytes=cached, blocks=part.running, without=part.without),
            span=span,
            prefill=prefill,
            plain_bytes=self._weights.work(shape.plain, cache_bytes=of_all).bytes_read,
        )
