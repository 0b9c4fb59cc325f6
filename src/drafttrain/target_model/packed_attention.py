"""Attention of packed rows: one softmax over the columns of the query's document and over keys of the query's own.

A kernel attends to the columns and also returns the logarithm of its normalizer. The whole softmax's normalizer adds the
scores of the own keys, and each part is weighted by its share. This is exact, and no score matrix is stored. Given the
normalizer and the output of the whole softmax, the kernel's backward pass returns the whole softmax's gradients.

Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax, arXiv 1805.02867.

B = sequences, T = positions, N = slots of all rows, one after another, H = heads, G = key-value heads,
d = width of a head
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drafttrain.core.batches import PackedDocuments
from drafttrain.target_model.packed_kernels import inner, kernel_for


class Columns:
    """Keys and values of all slots of packed documents, which do not attend to each other."""

    def __init__(self, keys_BGTd: Tensor, values_BGTd: Tensor, documents: PackedDocuments) -> None:
        self.keys_NGd, self.values_NGd = _slots(keys_BGTd), _slots(values_BGTd)
        self.documents = documents

    def attend(
        self, query_BHTd: Tensor, own: Sequence[tuple[Tensor, Tensor]] = (), *, scale: float | None = None
    ) -> Tensor:
        """Return attended_BHTd: each query attends to its document's columns up to its own slot, and to its own keys.

        Args:
            own: Further (key_BGTd, value_BGTd); a query attends only to the one at its own slot.
            scale: Factor on the scores; None: 1 / sqrt(d).
        """
        states = [_slots(states_BGTd) for pair in own for states_BGTd in pair]
        scale = 1 / math.sqrt(query_BHTd.shape[-1]) if scale is None else scale
        attended_NHd: Tensor = _Attention.apply(
            self.documents, scale, _slots(query_BHTd), self.keys_NGd, self.values_NGd, *states
        )
        return attended_NHd.unflatten(0, query_BHTd.shape[::2]).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        documents: PackedDocuments,
        scale: float,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        *own: Tensor,
    ) -> Tensor:
        with _given_types(query_NHd):
            kernel = kernel_for(query_NHd)
            attended_NHd, normalizer_NH = kernel.forward(query_NHd, keys_NGd, values_NGd, documents, scale)
            scores = [scale * inner(query_NHd, _to_heads(key, query_NHd)) for key in own[::2]]
            if own:
                of_columns_NH = normalizer_NH
                normalizer_NH = torch.stack([of_columns_NH, *scores]).logsumexp(dim=0)
                whole_NHd = attended_NHd * (of_columns_NH - normalizer_NH).exp()[..., None]
                for score_NH, value in zip(scores, own[1::2], strict=True):
                    whole_NHd += (score_NH - normalizer_NH).exp()[..., None] * _to_heads(value, query_NHd)
                attended_NHd = whole_NHd.to(query_NHd.dtype)
        ctx.documents, ctx.scale, ctx.kernel, ctx.num_own = documents, scale, kernel, len(scores)
        ctx.save_for_backward(query_NHd, keys_NGd, values_NGd, attended_NHd, normalizer_NH, *scores, *own)
        return attended_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHd: Tensor) -> tuple[Tensor | None, ...]:
        query_NHd, keys_NGd, values_NGd, attended_NHd, normalizer_NH, *rest = ctx.saved_tensors
        scores, own = rest[: ctx.num_own], rest[ctx.num_own :]
        with _given_types(query_NHd):
            in_query_NHd, in_keys, in_values = ctx.kernel.backward(
                gradient_NHd, query_NHd, keys_NGd, values_NGd, attended_NHd, normalizer_NH, ctx.documents, ctx.scale
            )
            drift_NH = inner(gradient_NHd, attended_NHd)
            in_own = []
            for score_NH, key, value in zip(scores, own[::2], own[1::2], strict=True):
                weight_NH = (score_NH - normalizer_NH).exp()
                moved_NH = weight_NH * (inner(gradient_NHd, _to_heads(value, query_NHd)) - drift_NH)
                in_score_NH1 = (ctx.scale * moved_NH)[..., None]
                in_query_NHd = in_query_NHd + in_score_NH1 * _to_heads(key, query_NHd)
                in_own += [_summed(in_score_NH1 * query_NHd, key), _summed(weight_NH[..., None] * gradient_NHd, value)]
        return None, None, in_query_NHd.to(query_NHd.dtype), in_keys, in_values, *in_own


def _slots(states_BHTd: Tensor) -> Tensor:
    """Return states_NHd."""
    return states_BHTd.transpose(1, 2).flatten(0, 1)


def _to_heads(states_NGd: Tensor, query_NHd: Tensor) -> Tensor:
    """Return states_NHd: each key-value head repeated for each of its query heads."""
    return states_NGd.repeat_interleave(query_NHd.shape[1] // states_NGd.shape[1], dim=1)


def _summed(states_NHd: Tensor, like_NGd: Tensor) -> Tensor:
    """Return states_NGd: the sum over the query heads of each key-value head."""
    return states_NHd.unflatten(1, (like_NGd.shape[1], -1)).sum(dim=2).to(like_NGd.dtype)


def _given_types(like: Tensor) -> torch.autocast:
    """Return a context without autocast, which would round scores that are float32 on purpose."""
    return torch.autocast(like.device.type, enabled=False)
