"""How much the tokens of a text attend to those before them: the attention of a model, layer by layer, while it reads.

B = sequences, N = queries, C = columns of the cache, P = observed keys, H = heads, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.attention import given_attention, replaced_attention
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.grouped_attention import BEYOND

NAME = "drafttrain_observed"
"""The name of this attention in transformers' registries. A model has it only while it is observed."""

T = TypeVar("T")
Observe = Callable[[Tensor], None]
"""Gets weights_HNC of a layer."""

_observe: ContextVar[Observe | None] = ContextVar("gets the attention of each layer", default=None)


def attention_to(lm: CachedLM, tokens: Sequence[int], *, after: int, summary: Callable[[Tensor], T]) -> list[T]:
    """Return what a summary makes of each layer's attention while the model reads tokens again, or tokens that follow.

    The cache stays as it is. Only one layer's attention is in memory at a time.

    Args:
        lm: Has read one sequence.
        tokens: They follow the first `after` cached tokens. Those that are cached too come first.
        summary: Gets weights_HNP: the attention of every token and head to the cached tokens. Rows add up to at most 1: the rest
            is for tokens that are not cached.

    Raises:
        CheckpointError: The attention of this model cannot be observed.
    """
    (cached,) = lm.cache.lengths
    assert after <= cached <= after + len(tokens), "the cached tokens come first"
    found: list[T] = []

    def observe(weights_HNC: Tensor) -> None:
        # The columns of the tokens that are read again follow those of all cached ones, which are masked from `after` on.
        again_HNC = weights_HNC[..., cached : 2 * cached - after]
        found.append(summary(torch.cat([weights_HNC[..., :after], again_HNC], dim=-1)))

    lm.read_again([tokens], visible=[after], within=_observed(lm, observe))
    if len(found) != lm.model.config.get_text_config().num_hidden_layers:
        raise CheckpointError(
            f"{lm.name}: {type(lm.model).__name__} does not let its attention be observed: {len(found)} of its layers use "
            "transformers' attention interface"
        )
    return found


@contextmanager
def _observed(lm: CachedLM, observe: Observe) -> Iterator[None]:
    """Within this context the model's layers report their attention."""
    if NAME not in AttentionInterface():
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, eager_mask)
    if not getattr(lm.model, "_supports_attention_backend", False):
        raise CheckpointError(f"{lm.name}: {type(lm.model).__name__} does not let its attention be observed")
    reset = _observe.set(observe)
    try:
        with replaced_attention(given_attention(lm.model), NAME):
            yield
    finally:
        _observe.reset(reset)


def _attention(
    module: Any, query_BHNd: Tensor, keys_BGCd: Tensor, values_BGCd: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Return (attended_BNHd, None), the form that transformers expects."""
    if beyond := [name for name in BEYOND if more.get(name) is not None]:
        raise CheckpointError(
            f"attention with {', '.join(beyond)} cannot be observed: it is more than a masked softmax"
        )
    scale = more.get("scaling") or query_BHNd.shape[-1] ** -0.5
    groups = query_BHNd.shape[1] // keys_BGCd.shape[1]
    keys_BHCd, values_BHCd = (states.repeat_interleave(groups, dim=1) for states in (keys_BGCd, values_BGCd))
    scores_BHNC = query_BHNd @ keys_BHCd.transpose(2, 3) * scale
    if attention_mask is not None:
        scores_BHNC = scores_BHNC + attention_mask
    weights_BHNC = scores_BHNC.softmax(dim=-1, dtype=torch.float32)
    observe = _observe.get()
    assert observe is not None, "only within a call of attention_to"
    observe(weights_BHNC[0])
    attended_BHNd = weights_BHNC.to(query_BHNd.dtype) @ values_BHCd
    return attended_BHNd.transpose(1, 2).contiguous(), None
