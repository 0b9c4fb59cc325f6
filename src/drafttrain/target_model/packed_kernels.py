"""Kernels of causal attention within packed documents that also return the normalizer. Queries are at the last columns.

The backward pass recomputes the weights as exp(score - normalizer) from the normalizer and the output it is given. If those
belong to a softmax over more than these columns, so do the gradients.

Source: Dao 2023, FlashAttention-2, arXiv 2307.08691, 3.1.

N = queries of all documents (or their columns), one after another, M = queries of a document, H = heads,
G = key-value heads, d = width of a head; in one piece of a document: S = slots, Q = S H / G queries of a key-value head,
C = columns
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments

PIECE_SLOTS = 512
"""Slots of a document whose scores exist at the same time if there is no flash attention."""

FLASH_WIDTHS = range(8, 193, 8)
"""Head widths that flash attention supports, in both passes, on every GPU that runs it."""

FLASH_CAPABILITY = (8, 0)
"""The lowest CUDA compute capability with flash attention: Ampere."""


class Kernel(Protocol):
    """Causal attention within each document."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normalizer_NH): the second is the logsumexp of the scores, in float32 or wider."""
        ...

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normalizer_NH: Tensor,
        documents: PackedDocuments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, keys and values for a softmax with this output and normalizer."""
        ...


def kernel_for(query_NHd: Tensor) -> type[Kernel]:
    """Return the kernel for states of this device, type and width."""
    if query_NHd.device.type == "cpu":
        return FlashOnCPU
    return FlashOnCUDA if flash_on_cuda(query_NHd.device, query_NHd.dtype, query_NHd.shape[-1]) else Pieces


def flash_on_cuda(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether there is flash attention for states of this device, type and width of a head."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and width in FLASH_WIDTHS
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    )


class FlashOnCUDA:
    """PyTorch's flash attention over documents of any lengths."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normalizer_NH)."""
        attended_NHd, normalizer_HN, *_ = torch.ops.aten._flash_attention_forward(
            query_NHd,
            keys_NGd,
            values_NGd,
            cum_seq_q=documents.query_bounds,
            cum_seq_k=documents.bounds,
            max_q=documents.longest,
            max_k=documents.longest,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=scale,
        )
        return attended_NHd, normalizer_HN.T

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normalizer_NH: Tensor,
        documents: PackedDocuments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, keys and values."""
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            gradient_NHd.contiguous(),
            query_NHd,
            keys_NGd,
            values_NGd,
            attended_NHd,
            normalizer_NH.T.contiguous(),
            cum_seq_q=documents.query_bounds,
            cum_seq_k=documents.bounds,
            max_q=documents.longest,
            max_k=documents.longest,
            dropout_p=0.0,
            is_causal=True,
            # Only used with dropout.
            rng_state=torch.zeros(2, dtype=torch.uint64, device=query_NHd.device),
            unused=torch.empty(0, device=query_NHd.device),
            scale=scale,
        )
        return gradients


class FlashOnCPU:
    """PyTorch's flash attention for CPUs, one document at a time."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normalizer_NH)."""
        attended_NHd = torch.empty_like(query_NHd)
        normalizer_NH = query_NHd.new_empty(query_NHd.shape[:2], dtype=wide_type(query_NHd))
        for own, seen in documents.slices:
            attended_1HMd, normalizer_1HM = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _one(query_NHd[own]),
                _one(keys_NGd[seen]),
                _one(values_NGd[seen]),
                **_causal(query_NHd, own, seen, scale),
            )
            attended_NHd[own], normalizer_NH[own] = attended_1HMd[0].transpose(0, 1), normalizer_1HM[0].T
        return attended_NHd, normalizer_NH

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normalizer_NH: Tensor,
        documents: PackedDocuments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, keys and values.

        They are computed in float32 or wider: in half types code is compiled for every length of a document and never freed,
        and it takes longer.
        """
        types = (query_NHd.dtype, keys_NGd.dtype, values_NGd.dtype)
        gradient_NHd, query_NHd, keys_NGd, values_NGd, attended_NHd = (
            states.to(wide_type(states)) for states in (gradient_NHd, query_NHd, keys_NGd, values_NGd, attended_NHd)
        )
        found = (torch.empty_like(query_NHd), torch.empty_like(keys_NGd), torch.empty_like(values_NGd))
        for own, seen in documents.slices:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _one(gradient_NHd[own]),
                _one(query_NHd[own]),
                _one(keys_NGd[seen]),
                _one(values_NGd[seen]),
                _one(attended_NHd[own]),
                normalizer_NH[own].T[None],
                dropout_p=0.0,
                **_causal(query_NHd, own, seen, scale),
            )
            for whole, part, place in zip(found, gradients, (own, seen, seen), strict=True):
                whole[place] = part[0].transpose(0, 1)
        in_query, in_keys, in_values = (whole.to(dtype) for whole, dtype in zip(found, types, strict=True))
        return in_query, in_keys, in_values


def _causal(query_NHd: Tensor, own: slice, seen: slice, scale: float) -> dict[str, Any]:
    """Return the arguments that make the kernel align queries with the last columns.

    Its own causal mask is right only for as many queries as columns.
    """
    queries, columns = own.stop - own.start, seen.stop - seen.start
    if queries == columns:
        return {"is_causal": True, "scale": scale}
    behind_MC = query_NHd.new_full((queries, columns), -torch.inf).triu(columns - queries + 1)
    return {"is_causal": False, "attn_mask": behind_MC, "scale": scale}


def _one(states_MHd: Tensor) -> Tensor:
    """Return states_1HMd: a batch of one document."""
    return states_MHd.transpose(0, 1)[None]


class Pieces:
    """Plain matrix products over one piece of a document and the columns up to its end, for any device and type."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normalizer_NH)."""
        attended_NHd = torch.empty_like(query_NHd)
        normalizer_NH1 = query_NHd.new_empty(*query_NHd.shape[:2], 1, dtype=wide_type(query_NHd))
        groups = keys_NGd.shape[1]
        behind_QC = _behind(documents, query_NHd, groups)
        for own, seen in _pieces(documents):
            scores_GQC = _scores(_by_group(query_NHd[own], groups), keys_NGd[seen].transpose(0, 1), behind_QC, scale)
            highest_GQ1 = scores_GQC.amax(dim=-1, keepdim=True)
            weights_GQC = scores_GQC.sub_(highest_GQ1).exp_()
            sum_GQ1 = weights_GQC.sum(dim=-1, keepdim=True)
            mixed_GQd = weights_GQC.to(values_NGd.dtype) @ values_NGd[seen].transpose(0, 1)
            _write(attended_NHd[own], mixed_GQd / sum_GQ1)
            _write(normalizer_NH1[own], highest_GQ1 + sum_GQ1.log())
        return attended_NHd, normalizer_NH1[..., 0]

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normalizer_NH: Tensor,
        documents: PackedDocuments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, keys and values."""
        drift_NH1, normalizer_NH1 = inner(gradient_NHd, attended_NHd)[..., None], normalizer_NH[..., None]
        in_query = torch.empty_like(query_NHd)
        in_keys, in_values = (torch.zeros_like(states, dtype=wide_type(states)) for states in (keys_NGd, values_NGd))
        groups = keys_NGd.shape[1]
        behind_QC = _behind(documents, query_NHd, groups)
        for own, seen in _pieces(documents):
            query_GQd, gradient_GQd, normalizer_GQ1, drift_GQ1 = (
                _by_group(states[own], groups) for states in (query_NHd, gradient_NHd, normalizer_NH1, drift_NH1)
            )
            keys_GCd, values_GCd = keys_NGd[seen].transpose(0, 1), values_NGd[seen].transpose(0, 1)
            weights_GQC = _scores(query_GQd, keys_GCd, behind_QC, scale).sub_(normalizer_GQ1).exp_()
            in_values[seen] += (weights_GQC.to(values_GCd.dtype).mT @ gradient_GQd).transpose(0, 1)
            moved_GQC = (gradient_GQd @ values_GCd.mT).to(weights_GQC.dtype).sub_(drift_GQ1)
            in_scores_GQC = moved_GQC.mul_(weights_GQC).to(query_NHd.dtype)
            _write(in_query[own], in_scores_GQC @ keys_GCd * scale)
            in_keys[seen] += (in_scores_GQC.mT @ query_GQd * scale).transpose(0, 1)
        return in_query, in_keys.to(keys_NGd.dtype), in_values.to(values_NGd.dtype)


def _behind(documents: PackedDocuments, query_NHd: Tensor, groups: int) -> Tensor:
    """Return the mask of a piece at the end of the longest document: -inf at the columns after a query.

    Of a smaller piece and fewer columns it is the corner, the last of both.
    """
    slots = _largest(documents)
    behind_SC = query_NHd.new_zeros(slots, documents.longest)
    behind_SC[:, -slots:] = query_NHd.new_full((slots, slots), -torch.inf).triu(1)
    return behind_SC.repeat_interleave(query_NHd.shape[1] // groups, dim=0)


def _scores(query_GQd: Tensor, keys_GCd: Tensor, behind_QC: Tensor, scale: float) -> Tensor:
    """Return scores_GQC of a piece, float32 or wider."""
    corner_QC = behind_QC[-query_GQd.shape[1] :, -keys_GCd.shape[1] :]
    scores_GQC = torch.baddbmm(corner_QC[None], query_GQd, keys_GCd.mT, alpha=scale)
    return scores_GQC.to(wide_type(query_GQd))


def _largest(documents: PackedDocuments) -> int:
    """Return the slots of the largest piece."""
    return min(PIECE_SLOTS, documents.longest)


def _pieces(documents: PackedDocuments) -> list[tuple[slice, slice]]:
    """Return the slots of each piece, and those it may attend to: its document's, up to the end of the piece."""
    found = []
    for own, seen in documents.slices:
        for start in range(own.start, own.stop, PIECE_SLOTS):
            stop = min(start + PIECE_SLOTS, own.stop)
            found.append((slice(start, stop), slice(seen.start, seen.stop - (own.stop - stop))))
    return found


def _by_group(states_SHd: Tensor, groups: int) -> Tensor:
    """Return states_GQd: the queries of each key-value head, one after another."""
    return states_SHd.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _write(states_SHd: Tensor, states_GQd: Tensor) -> None:
    """Write states in the layout of `_by_group` back to their slots."""
    groups = len(states_GQd)
    states_SHd.unflatten(1, (groups, -1)).copy_(states_GQd.unflatten(1, (len(states_SHd), -1)).transpose(0, 1))


def inner(left_NHd: Tensor, right_NHd: Tensor) -> Tensor:
    """Return the inner product of each pair, float32 or wider."""
    return (left_NHd.to(wide_type(left_NHd)) * right_NHd).sum(dim=-1)


def wide_type(like: Tensor) -> torch.dtype:
    """Return the type for sums and exponentials: float32 or wider."""
    return torch.promote_types(like.dtype, torch.float32)
