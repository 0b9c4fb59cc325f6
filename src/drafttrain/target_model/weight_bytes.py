"""The bytes of weights that a call of a causal LM reads."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from drafttrain.target_model.anatomy import blocks


class WeightBytes:
    """Bytes of weights that a call reads: the whole body, one embedding row per token, and the head if it runs.

    A tied embedding counts as rows on input and as the whole head on output. All experts of a mixture count.
    """

    def __init__(self, model: Any) -> None:
        embeddings = {m.weight: m for m in model.modules() if isinstance(m, nn.Embedding)}
        head_module = model.get_output_embeddings()
        head = set() if head_module is None else set(head_module.parameters())
        parameters = set(model.parameters())
        self._model = model
        self._row = sum(w.shape[1] * w.element_size() for w in embeddings)
        self._head = sum(w.numel() * w.element_size() for w in head)
        self._body = sum(w.numel() * w.element_size() for w in parameters - set(embeddings) - head)

    def read(self, num_tokens: int, *, head: bool, blocks: range | None = None) -> int:
        """Return the bytes of a call with these blocks; None: with all of them."""
        body = self._body if blocks is None else self._of_blocks(blocks)
        return body + self._row * num_tokens + (self._head if head else 0)

    def _of_blocks(self, running: range) -> int:
        """Return the bytes of these blocks; with the last one also of everything else outside embedding and head."""
        rest = self._body - sum(self._by_block) if running.stop == len(self._by_block) else 0
        return sum(self._by_block[index] for index in running) + rest

    @cached_property
    def _by_block(self) -> list[int]:
        return [sum(w.numel() * w.element_size() for w in set(block.parameters())) for block in blocks(self._model)]
