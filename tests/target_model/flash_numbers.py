"""Numbers on the CPU for the operators of CUDA's flash attention, by what PyTorch promises of them.

H = heads, M = queries, C = columns, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def causal(query_MHd: Tensor, keys_CGd: Tensor, bounds: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Return scores_HMC of queries at the last columns of each document, -inf across documents and after the query."""
    numbers, places = [], []
    for states, starts in zip((query_MHd, keys_CGd), bounds, strict=True):
        slots, ends = torch.arange(len(states)), starts[1:].long()
        numbers.append(torch.bucketize(slots, ends, right=True))
        # Aligned at the end, which queries and columns share.
        places.append(ends[numbers[-1]] - slots)
    allowed_MC = (numbers[0][:, None] == numbers[1]) & (places[0][:, None] <= places[1])
    keys_CHd = keys_CGd.repeat_interleave(query_MHd.shape[1] // keys_CGd.shape[1], dim=1)
    return (torch.einsum("nhd,mhd->hnm", query_MHd, keys_CHd) * scale).masked_fill(~allowed_MC, -torch.inf)


@contextmanager
def flash_numbers() -> Iterator[list[tuple[int, ...]]]:
    """Run the operators on the CPU within this context; yield the shapes of their queries."""
    calls: list[tuple[int, ...]] = []

    def forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, *, scale):  # type: ignore[no-untyped-def]
        calls.append(tuple(query.shape))
        assert (is_causal, dropout_p, cum_seq_q.dtype) == (True, 0, torch.int32)
        assert max(int(cum_seq_q.diff().max()), int(cum_seq_k.diff().max())) <= max_q == max_k
        assert int(cum_seq_q.diff().min()) > 0
        given, (query, key, value) = query.dtype, (wide(x) for x in (query, key, value))
        scores_HNN = causal(query, key, (cum_seq_q, cum_seq_k), scale)
        value_NHd = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        attended = torch.einsum("hnm,mhd->nhd", scores_HNN.softmax(dim=-1), value_NHd)
        return attended.to(given), scores_HNN.logsumexp(dim=-1), torch.empty(0), torch.empty(0), torch.empty(0)

    def backward(grad, query, key, value, out, lse, cum_seq_q, cum_seq_k, *rest, scale):  # type: ignore[no-untyped-def]
        # The kernel's formula: weights from the given normalizer, their drift from the given output.
        heads, groups, given = query.shape[1], key.shape[1], query.dtype
        grad, query, key, value, out = (wide(x) for x in (grad, query, key, value, out))
        weights_HNN = (causal(query, key, (cum_seq_q, cum_seq_k), scale) - lse[:, :, None]).exp()
        key_NHd, value_NHd = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
        drift_NH = (grad * out).sum(dim=-1)
        moved_HNN = torch.einsum("nhd,mhd->hnm", grad, value_NHd) - drift_NH.T[:, :, None]
        in_scores_HNN = weights_HNN * moved_HNN * scale
        in_key = torch.einsum("hnm,nhd->mhd", in_scores_HNN, query)
        in_value = torch.einsum("hnm,nhd->mhd", weights_HNN, grad)
        in_groups = (x.unflatten(1, (groups, -1)).sum(dim=2) for x in (in_key, in_value))
        gradients = (torch.einsum("hnm,mhd->nhd", in_scores_HNN, key_NHd), *in_groups)
        return tuple(gradient.to(given) for gradient in gradients)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
