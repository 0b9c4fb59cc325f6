"""The work of a call of a causal LM: bytes that it reads and operations, by its shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import nn

from drafttrain.core.generations import ForwardShape, Work
from drafttrain.core.weights import Weights, weights_of
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.matrix_products import active_experts, query_width


class ModelWeights:
    """The weights that calls read: the whole body, one embedding row per token, and the head if it runs.

    A tied embedding counts as rows on input and as the whole head on output. All experts of a mixture count as read, and those that
    a token is sent to as computed.
    """

    def __init__(self, model: Any) -> None:
        embeddings = {m.weight: m for m in model.modules() if isinstance(m, nn.Embedding)}
        head_module = model.get_output_embeddings()
        head = set() if head_module is None else set(head_module.parameters())
        others = set(model.parameters()) - set(embeddings) - head
        self._model = model
        self._row = sum(w.shape[1] * w.element_size() for w in embeddings)
        self._head = Weights() if head_module is None else weights_of(head_module)
        self._body = sum(w.numel() * w.element_size() for w in others)

    def work(
        self, shape: ForwardShape, *, cache_bytes: int, blocks: range | None = None, without: Weights | None = None
    ) -> Work:
        """Return the work of a call with these blocks; None: with all of them.

        Args:
            cache_bytes: Of one token of one sequence, over these blocks.
            without: The weights of sublayers that do not run (`of_sublayers`).
        """
        blocks = range(len(self._by_block)) if blocks is None else blocks
        running = self._of_blocks(blocks) - (without or Weights())
        work = running.read(shape.num_tokens, pairs=shape.pairs)
        if shape.head_rows:
            work += self._head.read(shape.head_rows)
        cached = cache_bytes * (shape.context + shape.num_tokens)
        return work + Work(row_bytes=self._row * shape.num_tokens, cache_bytes=cached)

    def of_sublayers(self, attention: Sequence[nn.Module], mlps: Sequence[nn.Module]) -> Weights:
        """Return the weights of these sublayers of blocks."""
        config = self._model.config.get_text_config()
        width, active = query_width(config), active_experts(config)
        found = [weights_of(one, attention_width=width) for one in attention]
        return sum((*found, *(weights_of(one, active=active) for one in mlps)), Weights())

    def _of_blocks(self, running: range) -> Weights:
        """Return these blocks; with the last one also the bytes of everything else outside embedding and head."""
        every = self._by_block
        rest = self._body - sum(one.num_bytes for one in every) if running.stop == len(every) else 0
        return sum((every[index] for index in running), Weights(num_bytes=rest))

    @cached_property
    def _by_block(self) -> list[Weights]:
        config = self._model.config.get_text_config()
        width, active = query_width(config), active_experts(config)
        return [weights_of(block, attention_width=width, active=active) for block in blocks(self._model)]
