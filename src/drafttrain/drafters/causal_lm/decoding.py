"""A plain Llama as decoding runs it: the layers on plain tensors, with their caches.

B = sequences, N = new tokens of one call (the longest sequence's), C = columns of the cache, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters.decoding_layer import DecodingAttention, DecodingSwiGLU, Turn, TurnTable, attend
from drafttrain.drafters.few_rows import product_with
from drafttrain.drafters.keys_and_values import KeysAndValues
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.model_weights import ModelWeights
from drafttrain.target_model.ragged_cache import Tree, ancestors, depths, padded_rows

PLAIN_MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FIXED_ANGLES = ("default", "linear", "yarn", "llama3")
"""Rope types whose angles are the same in every call."""
MOST_WEIGHTS = 1 << 29
"""Weights are stored a second time. In a larger model the framework's own time matters less than that memory."""


def decoding_lm(model: Any, *, listener: ForwardListener | None = None) -> DecodingLM | CachedLM:
    """Return the drafter on plain tensors, or as transformers runs it."""
    small = sum(weight.numel() for weight in model.parameters()) <= MOST_WEIGHTS
    made = DecodingLM if small and is_plain(model) else CachedLM
    return made(model, name="drafter", listener=listener)


def is_plain(model: Any) -> bool:
    """Return whether a model is what `DecodingLM` computes: a Llama with unchanged modules on one device."""
    config = model.config
    return (
        type(model).__name__ in PLAIN_MODELS
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and config.hidden_act == "silu"
        and model.model.rotary_emb.rope_type in FIXED_ANGLES
        and all(_is_unchanged(module) for module in model.modules())
        and len({(weight.device, weight.dtype) for weight in model.parameters()}) == 1
    )


def _is_unchanged(module: nn.Module) -> bool:
    """Return whether a module is transformers' or PyTorch's own: not quantized, adapted, compiled or with a hook."""
    own = type(module).__module__.startswith(("torch.nn.modules.", "transformers.models.", "transformers.activations"))
    hooked = module._forward_hooks or module._forward_pre_hooks
    return own and not hooked and "forward" not in module.__dict__


class DecodingLM:
    """A causal LM and the cache of the sequences that it reads, like `CachedLM`.

    Weights are prepared once: later changes of the model do not reach it. Every sequence fills its columns from the left, also
    with pending tokens, so the rejected end of a chain is forgotten by its number alone; the path of a tree is moved together.
    What is right of them is overwritten later.

    Args:
        model: A model that `is_plain`.
        running: The layers that a call runs; None: all. Those after the first ones read `embedded` states, and only logits after the last
            layer are the model's own.
    """

    def __init__(
        self, model: Any, *, name: str, listener: ForwardListener | None = None, running: range | None = None
    ) -> None:
        trunk = model.model
        self.running = running or range(len(trunk.layers))
        self.name = name
        self.device = next(model.parameters()).device
        self.lengths: list[int] = []
        """Tokens in the cache by sequence, including pending ones."""
        self.kept: list[int] = []
        """Tokens in the cache by sequence at the last `keep`."""
        self._pending: list[list[int]] | None = None
        """By sequence, the parents of the pending tokens (see `Tree`); None: all of them form chains."""
        self._listener = listener
        self._embedding_VD = trunk.embed_tokens.weight.detach()
        self._layers = [DecodingLayer(trunk.layers[index]) for index in self.running]
        self._norm = _norm(trunk.norm)
        self._head = product_with([model.lm_head])
        self._turns = TurnTable(lambda positions_BN, like: trunk.rotary_emb(like, positions_BN))
        self._weights = ModelWeights(model)

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return None: sequences of any length can be batched."""
        return None

    def begin(self, prompts: Sequence[Sequence[int]], *, needs: TargetNeeds | None = None) -> list[TargetOutput]:
        """Empty the cache and read these prompts in one call. Prompts may be empty."""
        self.lengths = [0] * len(prompts)
        for layer in self._layers:
            layer.columns = KeysAndValues()
        self._pending, self.kept = None, list(self.lengths)
        seen = self.forward(prompts, needs=needs or TargetNeeds(), prefill=True)
        self.kept = list(self.lengths)
        return seen

    @torch.no_grad()
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        parents: Sequence[Tree] | None = None,
        needs: TargetNeeds | None = None,
        prefill: bool = False,
        embedded: Sequence[Tensor] | None = None,
        last: bool = False,
    ) -> list[TargetOutput]:
        """Read new tokens of every sequence; return the requested outputs of each, as a batch of one.

        Args:
            tokens: Nodes by sequence; may be empty for some.
            parents: The tree of each sequence (see `Tree`); None: all are chains.
            needs: What to return, of logits, final states, and the states after the last layer that runs; by default logits.
            prefill: The call reads prompts (reported to the listener).
            embedded: By sequence, embedded_ND that are read in place of the embeddings of its tokens; None: those.
            last: Return logits and the final state of the last token of each sequence only.
        """
        needs = needs or TargetNeeds(logits=True)
        assert set(needs.hidden) <= {self.running.stop}, "other states are not stored"
        sizes = [len(nodes) for nodes in tokens]
        if not any(sizes):
            return [TargetOutput() for _ in tokens]
        span = Span(self.device)
        lengths = self.lengths
        stream_BND = self._stream(tokens, parents, embedded, width=max(sizes))
        rows_BND = stream_BND
        if last:
            rows_BND = stream_BND[range(len(sizes)), [max(size - 1, 0) for size in sizes]].unsqueeze(1)
        final_BND = self._norm(rows_BND) if needs.logits or needs.final else rows_BND
        logits_BNV = self._head(final_BND) if needs.logits else None
        self.lengths = [length + size for length, size in zip(self.lengths, sizes, strict=True)]
        if self._listener is not None:
            head_rows = (sum(map(bool, sizes)) if last else sum(sizes)) if needs.logits else 0
            shape = ForwardShape.of(sizes, lengths, num_layers=len(self._layers), head_rows=head_rows)
            self._listener(self._event(shape, prefill=prefill, span=span.end()))
        return [
            TargetOutput(
                logits_BTV=None if logits_BNV is None else logits_BNV[row : row + 1, :size],
                hidden_BTD=dict.fromkeys(needs.hidden, stream_BND[row : row + 1, :size]),
                final_BTD=final_BND[row : row + 1, :size] if needs.final else None,
            )
            for row, size in enumerate(sizes)
        ]

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these of each sequence's pending tokens (a path down the tree), and drop the others."""
        lengths = [kept + len(chosen) for kept, chosen in zip(self.kept, nodes, strict=True)]
        if any(chosen and chosen[-1] != len(chosen) - 1 for chosen in nodes):
            first, end = min(self.kept), max(lengths)
            columns = [
                [*range(first, kept), *(kept + node for node in chosen), *range(length, end)]
                for kept, chosen, length in zip(self.kept, nodes, lengths, strict=True)
            ]
            columns_BN = torch.tensor(columns).to(self.device)
            for layer in self._layers:
                layer.columns.move(columns_BN, first=first)
        self.lengths = lengths
        self.kept, self._pending = list(self.lengths), None

    def cut(self, lengths: Sequence[int]) -> None:
        """Keep only the first tokens of each sequence, also of those that were kept before; all pending ones form chains."""
        self.lengths = [min(old, new) for old, new in zip(self.lengths, lengths, strict=True)]
        self.kept = list(self.lengths)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences, in this order. The others are finished."""
        assert self.lengths == self.kept, "keep or drop the pending tokens before sequences are dropped"
        self.lengths = [self.lengths[i] for i in keep]
        self.kept = list(self.lengths)
        for layer in self._layers:
            layer.columns.select(keep, width=max(self.lengths, default=0))

    def _stream(
        self,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Tree] | None,
        embedded: Sequence[Tensor] | None,
        *,
        width: int,
    ) -> Tensor:
        """Return stream_BND after the last layer, before the final norm, and write the columns of these tokens."""
        starts, end = self.lengths, max(self.lengths) + width
        columns = [list(range(start, start + width)) for start in starts]
        if parents is None and self._pending is not None:
            parents = [
                range(self._num_pending(row) - 1, self._num_pending(row) - 1 + len(nodes))
                for row, nodes in enumerate(tokens)
            ]
        positions = columns
        if parents is not None:
            self._pending = [[*self._before(row), *tree] for row, tree in enumerate(parents)]
            positions = [
                [kept + depth for depth in [*depths(whole)[len(whole) - len(tree) :], *[0] * (width - len(tree))]]
                for kept, whole, tree in zip(self.kept, self._pending, parents, strict=True)
            ]
        padded = [[*nodes, *[0] * (width - len(nodes))] for nodes in tokens]
        tokens_BN, positions_BN, columns_BN = torch.tensor([padded, positions, columns]).to(self.device)
        # Padding follows a text, so no token of it attends to padding.
        prompts = not max(starts) and parents is None
        allowed_BNC = None if prompts else self._allowed(parents, width=width)
        if allowed_BNC is not None:
            allowed_BNC = allowed_BNC.to(self.device)
        together = min(starts) == max(starts)

        def store(layer: KeysAndValues, key_BGNd: Tensor, value_BGNd: Tensor) -> tuple[Tensor, Tensor]:
            layer.reserve(end, like=(key_BGNd, value_BGNd))
            if together:
                layer.write(starts[0], key_BGNd, value_BGNd)
            else:
                layer.write_at(columns_BN, key_BGNd, value_BGNd)
            return layer.first(end)

        stream_BND = embedding(tokens_BN, self._embedding_VD) if embedded is None else padded_rows(embedded, width)
        turn = self._turns.at(positions_BN, last=end - 1, like=stream_BND)
        for group in self._groups():
            attended = [layer.attended(stream_BND, turn, store, allowed_BNC, causal=prompts) for layer in group]
            for layer, added_BND in zip(group, attended, strict=True):
                stream_BND = layer.fed(stream_BND + added_BND)
        return stream_BND

    def _groups(self) -> list[list[DecodingLayer]]:
        """Return the layers in order, in groups whose attention reads the same states."""
        return [[layer] for layer in self._layers]

    def _allowed(self, parents: Sequence[Tree] | None, *, width: int) -> Tensor | None:
        """Return the columns that each node may attend to; None: all of them."""
        starts = self.lengths
        if width == 1 and min(starts) == max(starts) and self._pending is None:
            return None
        last_BN = torch.tensor(starts)[:, None] + torch.arange(width)
        allowed_BNC = torch.arange(max(starts) + width) <= last_BN[:, :, None]
        for row, tree in enumerate(parents or ()):
            kept, end = self.kept[row], starts[row] + len(tree)
            assert self._pending is not None
            allowed_BNC[row, : len(tree), kept:end] = ancestors(self._pending[row])[end - kept - len(tree) :]
        return allowed_BNC

    def _num_pending(self, row: int) -> int:
        return self.lengths[row] - self.kept[row]

    def _before(self, row: int) -> list[int]:
        """Return the parents of a sequence's pending tokens."""
        return list(range(-1, self._num_pending(row) - 1)) if self._pending is None else self._pending[row]

    def _event(self, shape: ForwardShape, *, prefill: bool, span: Span) -> ForwardEvent:
        cached = sum(layer.columns.bytes_per_column() for layer in self._layers)
        return ForwardEvent(
            model=self.name,
            shape=shape,
            work=self._weights.work(shape, cache_bytes=cached, blocks=self.running),
            span=span,
            prefill=prefill,
            plain_bytes=self._weights.work(shape.plain, cache_bytes=cached).bytes_read,
        )


class DecodingLayer:
    """A decoder layer and its keys and values."""

    def __init__(self, layer: Any) -> None:
        self.columns = KeysAndValues()
        self._attention = DecodingAttention(layer.self_attn, head_dim=layer.self_attn.head_dim)
        self._mlp = DecodingSwiGLU(layer.mlp)
        self._first, self._second = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)

    def attended(
        self,
        stream_BND: Tensor,
        turn: Turn,
        store: Callable[[KeysAndValues, Tensor, Tensor], tuple[Tensor, Tensor]],
        allowed_BNC: Tensor | None,
        *,
        causal: bool,
    ) -> Tensor:
        """Return what attention adds to the residual stream.

        Args:
            store: Writes new keys and values; returns those of all columns.
        """
        query, key, value = self._attention.project(self._first(stream_BND), turn)
        keys, values = store(self.columns, key, value)
        return self._attention.output(attend(query, keys, values, allowed_BNC, causal=causal))

    def fed(self, stream_BND: Tensor) -> Tensor:
        """Return the residual stream after the feed-forward block, which reads it with the attention's part added."""
        return stream_BND + self._mlp(self._second(stream_BND))


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Return transformers' RMS norm as a function: in float32 for every type, and rounded before the weight."""
    weight_D, eps = module.weight.detach(), module.variance_epsilon
    return lambda states: weight_D * rms_norm(states.float(), weight_D.shape, None, eps).to(states.dtype)
