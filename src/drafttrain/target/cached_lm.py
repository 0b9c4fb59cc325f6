"""Any Hugging Face causal LM over a list of sequences with a key-value cache: one call reads all nodes of all of them.

B = sequences, N = nodes of one call (the longest sequence's), V = vocabulary, D = hidden
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.records import ForwardEvent, TargetNeeds, TargetOutput
from drafttrain.core.roles import ForwardListener
from drafttrain.target.anatomy import taps, trunk
from drafttrain.target.ragged_cache import RaggedCache, Tree, is_chain

FULL_ATTENTION = ("full_attention", "attention")
SLIDING_ATTENTION = ("sliding_attention", "chunked_attention", "local_attention")
MASKED_ATTENTION = ("sdpa", "eager")


class CachedLM:
    """A causal LM and the cache of the sequences that it is reading.

    `forward` reads new tokens, which are then pending; `keep` decides which of them stay. Rows of two calls with different
    padding differ by rounding: in float32 by about 1e-6.
    """

    def __init__(self, model: Any, *, name: str, listener: ForwardListener | None = None) -> None:
        self.model = model
        self.name = name
        self.listener = listener
        self.device = next(model.parameters()).device
        self._config = model.config.get_text_config()
        self._window = _window(self._config, name=name)
        _refuse_states_that_cannot_roll_back(model, name=name)
        self._trunk = trunk(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._weights = _WeightBytes(model)
        self.cache = RaggedCache(0)

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache by sequence, pending ones included."""
        return self.cache.lengths

    def begin(self, prompts: Sequence[Sequence[int]], *, needs: TargetNeeds | None = None) -> list[TargetOutput]:
        """Forget everything and read these prompts in one call; any of them may be empty."""
        self.cache = RaggedCache(len(prompts))
        seen = self.forward(prompts, needs=needs or TargetNeeds(), prefill=True)
        self.cache.commit()
        return seen

    @torch.no_grad()
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        parents: Sequence[Tree] | None = None,
        needs: TargetNeeds | None = None,
        prefill: bool = False,
    ) -> list[TargetOutput]:
        """Read new tokens of every sequence; return what was asked for by sequence, each a batch of one.

        Args:
            tokens: Nodes by sequence; a sequence with none is left alone.
            parents: The tree of each sequence (see `Tree`); None: all are chains.
            needs: What to return; logits when left out. Without logits the head does not run.
            prefill: Reads a prompt (told to the ledger).
        """
        needs = needs or TargetNeeds(logits=True)
        sizes = [len(nodes) for nodes in tokens]
        width = max(sizes, default=0)
        if width == 0:
            return [TargetOutput() for _ in tokens]
        began = self._now()
        trees = [None] * len(tokens) if parents is None else [None if is_chain(tree) else tree for tree in parents]
        arguments: dict[str, Any] = {
            "input_ids": self._padded(tokens, width),
            "attention_mask": self._mask(trees, width),
            "past_key_values": self.cache.hf,
            "use_cache": True,
        }
        if self._takes_positions:
            arguments["position_ids"] = self.cache.positions(sizes, trees, width=width).to(self.device)
        tapped: Any = taps(self.model, needs) if needs.hidden or needs.final else nullcontext({})
        with tapped as seen:
            output = (self.model if needs.logits else self._trunk)(**arguments)
        context = sum(length for length, size in zip(self.lengths, sizes, strict=True) if size)
        self.cache.appended(sizes, width=width)
        if self.listener is not None:
            self.listener(self._event(sizes, context=context, head=needs.logits, prefill=prefill, began=began))
        return [
            TargetOutput(
                logits_BTV=output.logits[row : row + 1, :size] if needs.logits else None,
                hidden_BTD={int(i): state[row : row + 1, :size] for i, state in seen.items() if i != "final"},
                final_BTD=seen["final"][row : row + 1, :size] if needs.final else None,
            )
            for row, size in enumerate(sizes)
        ]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these of every sequence's tokens read since the last `keep` (a path down the tree), forget the others."""
        self.cache.keep(nodes)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order: the others are finished."""
        self.cache.select(keep)

    def _padded(self, tokens: Sequence[Sequence[int]], width: int) -> Tensor:
        rows = [[*nodes, *[0] * (width - len(nodes))] for nodes in tokens]
        return torch.tensor(rows, device=self.device)

    def _mask(self, trees: Sequence[Tree | None], width: int) -> Tensor | None:
        """Return the additive mask, or None where the model's own causal mask is right."""
        allowed_BNC = self.cache.allowed(trees, width=width)
        if allowed_BNC is None:
            return None
        self._check_mask(allowed_BNC.shape[-1])
        dtype = self.model.dtype
        mask_BNC = torch.zeros(allowed_BNC.shape, dtype=dtype).masked_fill_(~allowed_BNC, torch.finfo(dtype).min)
        return mask_BNC[:, None].to(self.device)

    def _check_mask(self, columns: int) -> None:
        """Refuse trees and ragged batches where the model does not take a mask of ours."""
        attention = self._config._attn_implementation
        if attention not in MASKED_ATTENTION:
            raise CheckpointError(
                f"{self.name}: attention {attention!r} takes no tree mask: decode one sequence at a time in chains, "
                f"or load the model with {' or '.join(MASKED_ATTENTION)}"
            )
        if not self._takes_positions:
            raise CheckpointError(
                f"{self.name}: {type(self.model).__name__} takes no position_ids: decode one sequence at a time, in chains"
            )
        if self._window is not None and columns >= self._window:
            raise CheckpointError(
                f"{self.name}: {columns} positions reach its sliding window of {self._window}: "
                "decode one sequence at a time, in chains"
            )

    def _now(self) -> float:
        """Return the time when what was asked of the device so far is done; nobody listening, do not wait for that."""
        if self.listener is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _event(self, sizes: Sequence[int], *, context: int, head: bool, prefill: bool, began: float) -> ForwardEvent:
        num_tokens, num_sequences = sum(sizes), sum(size > 0 for size in sizes)
        return ForwardEvent(
            model=self.name,
            num_tokens=num_tokens,
            context=context,
            num_sequences=num_sequences,
            num_layers=int(self._config.num_hidden_layers),
            bytes_read=self._bytes_read(num_tokens, context, head=head),
            seconds=self._now() - began,
            prefill=prefill,
            plain_bytes=self._bytes_read(num_sequences, context, head=True),
        )

    def _bytes_read(self, num_tokens: int, context: int, *, head: bool) -> int:
        weights = self._weights.body + self._weights.row * num_tokens + (self._weights.head if head else 0)
        return weights + self.cache.bytes_per_token() * (context + num_tokens)


class _WeightBytes:
    """Bytes of weights that a call touches: all of the body, one row of each embedding a token, the head if it runs.

    A tied embedding is counted as rows going in and as the whole head going out. All experts of a mixture are counted.
    """

    def __init__(self, model: Any) -> None:
        embeddings = {m.weight: m for m in model.modules() if isinstance(m, nn.Embedding)}
        head_module = model.get_output_embeddings()
        head = set() if head_module is None else set(head_module.parameters())
        parameters = set(model.parameters())
        self.row = sum(w.shape[1] * w.element_size() for w in embeddings)
        self.head = sum(w.numel() * w.element_size() for w in head)
        self.body = sum(w.numel() * w.element_size() for w in parameters - set(embeddings) - head)


def _window(config: Any, *, name: str) -> int | None:
    """Return the sliding window in tokens; None: every layer looks at everything.

    Raises:
        CheckpointError: A layer keeps a state that cannot be rolled back.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - {*FULL_ATTENTION, *SLIDING_ATTENTION})
    if unknown:
        raise CheckpointError(
            f"{name}: layers of kind {', '.join(unknown)} keep a state that cannot be rolled back; "
            f"models of {', '.join((*FULL_ATTENTION, *SLIDING_ATTENTION))} layers can be decoded"
        )
    sliding = bool(kinds & set(SLIDING_ATTENTION)) if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return int(window) if sliding and window else None


def _refuse_states_that_cannot_roll_back(model: Any, *, name: str) -> None:
    if getattr(model, "_is_stateful", False):
        raise CheckpointError(f"{name}: {type(model).__name__} keeps a recurrent state, which cannot be rolled back")
