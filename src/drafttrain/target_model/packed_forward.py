"""Runs a transformers model on packed rows without a mask: flash attention reads each document by itself.

If a row has two documents or padding, transformers makes a dense mask. SDPA supports no mask with grouped heads, so it then
reads keys and values once per query head.

B = sequences, T = positions, H = heads, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.attention import given_attention, replaced_attention
from drafttrain.target_model.packed_attention import Columns
from drafttrain.target_model.packed_kernels import flash_on_cuda

NAME = "drafttrain_packed"
"""The name of this attention in transformers' registry. For an unknown name transformers makes no mask."""

BEYOND = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")
"""Arguments of an attention that is not a plain causal softmax."""

_documents: ContextVar[PackedDocuments | None] = ContextVar("documents of the rows that are read", default=None)
_calls: ContextVar[list[int] | None] = ContextVar("calls of the attention, where they are counted", default=None)


class NotPlain(Exception):
    """The model's attention is not a plain causal softmax."""


def may_be_read_packed(model: Any) -> bool:
    """Return whether all layers have full causal attention, and this machine has flash attention for them."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight
    return (
        model.config._attn_implementation == "sdpa"
        and kinds == {"full_attention"}
        and flash_on_cuda(embedding.device, embedding.dtype, width)
    )


@contextmanager
def packed(model: Any, documents: PackedDocuments) -> Iterator[list[int]]:
    """Within this context every attention of the model reads these documents one by one.

    Yields:
        A list that gets one item per call of the attention.

    Raises:
        NotPlain: In a forward, if the attention is not a plain causal softmax.
    """
    _register()
    calls: list[int] = []
    resets = _documents, _documents.set(documents), _calls, _calls.set(calls)
    try:
        with replaced_attention(given_attention(model), NAME):
            yield calls
    finally:
        resets[0].reset(resets[1])
        resets[2].reset(resets[3])


def through_every_block(model: Any, calls: list[int]) -> bool:
    """Return whether the attention was called once for each block."""
    return len(calls) == len(blocks(model))


def _register() -> None:
    from transformers import AttentionInterface

    if NAME not in AttentionInterface():
        AttentionInterface.register(NAME, _attention)


def _attention(
    module: Any,
    query_BHTd: Tensor,
    keys_BGTd: Tensor,
    values_BGTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return (attended_BTHd, None), the form that transformers expects."""
    documents, calls = _documents.get(), _calls.get()
    assert documents is not None, "only within `packed`"
    assert calls is not None
    calls.append(1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or dropout or not causal or _beyond(more) or keys_BGTd.shape != values_BGTd.shape:
        raise NotPlain(type(module).__name__)
    attended_BHTd = Columns(keys_BGTd, values_BGTd, documents).attend(query_BHTd, scale=scaling)
    return attended_BHTd.transpose(1, 2).contiguous(), None


def _beyond(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in BEYOND)
