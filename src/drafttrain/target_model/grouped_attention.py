"""Decoding on a CPU where query heads share keys and values: SDPA reads these once for all query heads of a group.

With a mask, transformers repeats keys and values for every query head; without one, PyTorch's kernel reads them again for each.
Here the query heads of a group are further query rows of one head.

B = sequences, N = new tokens, C = columns, H = heads, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from drafttrain.target_model.attention import given_attention, replaced_attention

NAME = "drafttrain_grouped"
"""The name of this attention in transformers' registries. A model has it only while `CachedLM` calls it."""
MOST_ROWS = 256
"""With more query rows in a group, reading keys and values again costs nothing beside the products, and the mask is large."""
BEYOND = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of an attention that is more than a masked softmax."""

_tiled: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar(
    "masks of a call and their tiles", default=None
)


class GroupedAttention:
    """Calls a model with grouped attention, where that is faster; else with its own."""

    def __init__(self, model: Any) -> None:
        _register()
        self._given = given_attention(model) if reads_keys_once(model) else []

    def __call__(self) -> AbstractContextManager[None]:
        """Return the context in which the model is called."""
        return _grouped(self._given) if self._given else nullcontext()


def reads_keys_once(model: Any) -> bool:
    """Return whether grouped attention serves this model: on a CPU, with SDPA, where query heads share keys and values."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    shared = (getattr(config, "num_key_value_heads", None) or heads) < heads
    replaceable = config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False)
    return shared and replaceable and next(model.parameters()).device.type == "cpu"


@contextmanager
def _grouped(given: list[tuple[Any, str]]) -> Iterator[None]:
    reset = _tiled.set({})
    try:
        with replaced_attention(given, NAME):
            yield
    finally:
        _tiled.reset(reset)


def _register() -> None:
    if NAME not in AttentionInterface():
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: Any, query_BHNd: Tensor, keys_BGCd: Tensor, values_BGCd: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Return (attended_BNHd, None), the form that transformers expects."""
    (heads, num_new), groups = query_BHNd.shape[1:3], keys_BGCd.shape[1]
    # Without a mask, several tokens are a prompt: its attention is causal.
    plain = (num_new == 1 or attention_mask is not None) and not more.get("dropout") and not _beyond(more)
    if heads == groups or not plain or (attention_mask is not None and attention_mask.shape[1] > 1):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHNd, keys_BGCd, values_BGCd, attention_mask, **more
        )
        return attended
    scale = more.get("scaling")
    if num_new * (heads // groups) > MOST_ROWS:
        attended_BHNd = scaled_dot_product_attention(
            query_BHNd, keys_BGCd, values_BGCd, attn_mask=attention_mask, scale=scale, enable_gqa=True
        )
    else:
        mask_B1RC = None if attention_mask is None else _tiles(attention_mask, heads // groups)
        attended_BHNd = attend_in_groups(query_BHNd, keys_BGCd, values_BGCd, mask_B1RC, scale=scale)
    return attended_BHNd.transpose(1, 2).contiguous(), None


def attend_in_groups(
    query_BHNd: Tensor,
    keys_BGCd: Tensor,
    values_BGCd: Tensor,
    mask_B1RC: Tensor | None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return attended_BHNd, with the query heads that share keys as further query rows of one head.

    Args:
        mask_B1RC: A row for each query of every head of a group, or one row for all; None: all columns.
    """
    groups, num_new = keys_BGCd.shape[1], query_BHNd.shape[2]
    rows_BGRd = query_BHNd.unflatten(1, (groups, -1)).flatten(2, 3)
    attended_BGRd = scaled_dot_product_attention(rows_BGRd, keys_BGCd, values_BGCd, attn_mask=mask_B1RC, scale=scale)
    return attended_BGRd.unflatten(2, (-1, num_new)).flatten(1, 2)


def _tiles(mask_B1NC: Tensor, count: int) -> Tensor:
    """Return mask_B1RC, the mask once for every query head of a group. All layers of a call share it."""
    tiled = _tiled.get()
    assert tiled is not None, "only within a call of CachedLM"
    if id(mask_B1NC) not in tiled:
        # The mask is stored beside its tiles: another one could get its id.
        tiled[id(mask_B1NC)] = mask_B1NC, mask_B1NC.repeat(1, 1, count, 1)
    return tiled[id(mask_B1NC)][1]


def _beyond(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in BEYOND)
