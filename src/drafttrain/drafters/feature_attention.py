"""Attention of a rollout: over the columns of its first step, and each slot's own keys of the steps since, in one softmax.

The columns are attended document by document, by a kernel that also returns the logarithm of its normaliser. The whole
softmax's normaliser adds the own scores, and both parts are weighed by their share in it: exact, and no matrix of scores is kept.
The backward pass of such a kernel computes its weights again as exp(score - normaliser): given the normaliser and the output of
the whole softmax, it returns the whole softmax's gradients.

Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax, arXiv 1805.02867; Dao 2023, FlashAttention-2,
arXiv 2307.08691, 3.1.

B = sequences, T = positions, N = slots of all rows, one after another, H = heads, G = key-value heads, R = H / G,
d = width of a head, K = own keys; of one piece of a document: S = slots, Q = S R queries of a key-value head, C = columns
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

PIECE_SLOTS = 512
"""Slots of a document whose scores exist at once where there is no kernel."""

FLASH_WIDTHS = range(8, 193, 8)
"""Widths of a head that flash attention takes, in both passes, on every GPU that runs it."""

FLASH_CAPABILITY = (8, 0)
"""CUDA's compute capability from which on there is flash attention: Ampere."""


class Columns:
    """Keys and values of every slot, of packed documents that do not see each other."""

    def __init__(self, keys_BGTd: Tensor, values_BGTd: Tensor, documents_BT: Tensor) -> None:
        self.keys_NGd, self.values_NGd = _slots(keys_BGTd), _slots(values_BGTd)
        self.documents = PackedDocuments(documents_BT)

    def attend(self, query_BHTd: Tensor, own: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """Return attended_BHTd: each query sees the columns of its document up to its own place, and what is its own.

        Args:
            own: Further (key_BGTd, value_BGTd) of which a query sees only the one at its own place.
        """
        states = [_slots(states_BGTd) for pair in own for states_BGTd in pair]
        attended_NHd: Tensor = _Attention.apply(
            self.documents, _slots(query_BHTd), self.keys_NGd, self.values_NGd, *states
        )
        return attended_NHd.unflatten(0, query_BHTd.shape[::2]).transpose(1, 2)


class PackedDocuments:
    """Where each document lies in the slots of packed rows; the padding of a row is one too."""

    def __init__(self, documents_BT: Tensor) -> None:
        first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        starts = first_BT.flatten().nonzero()[:, 0]
        self.bounds = pad(starts, (0, 1), value=documents_BT.numel()).int()
        """Where each document begins, and where the last one ends; on the device."""
        self.longest: int = documents_BT.shape[1]
        """No document has more slots."""

    @cached_property
    def slices(self) -> list[slice]:
        """The slots of each document."""
        bounds = self.bounds.tolist()
        return [slice(first, stop) for first, stop in pairwise(bounds)]

    @property
    def largest_piece(self) -> int:
        """Slots of the largest piece."""
        return min(PIECE_SLOTS, self.longest)

    @cached_property
    def pieces(self) -> list[tuple[slice, slice]]:
        """The slots of each piece, and those that it may see: of its document up to its own end."""
        return [
            (slice(start, min(start + PIECE_SLOTS, own.stop)), slice(own.start, min(start + PIECE_SLOTS, own.stop)))
            for own in self.slices
            for start in range(own.start, own.stop, PIECE_SLOTS)
        ]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, documents: PackedDocuments, query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, *own: Tensor
    ) -> Tensor:
        with _given_types(query_NHd):
            kernel = kernel_for(query_NHd)
            attended_NHd, normaliser_NH = kernel.forward(query_NHd, keys_NGd, values_NGd, documents)
            scores = [_scale(query_NHd) * _inner(query_NHd, _to_heads(key, query_NHd)) for key in own[::2]]
            if own:
                of_columns_NH = normaliser_NH
                normaliser_NH = torch.stack([of_columns_NH, *scores]).logsumexp(dim=0)
                whole_NHd = attended_NHd * (of_columns_NH - normaliser_NH).exp()[..., None]
                for score_NH, value in zip(scores, own[1::2], strict=True):
                    whole_NHd += (score_NH - normaliser_NH).exp()[..., None] * _to_heads(value, query_NHd)
                attended_NHd = whole_NHd.to(query_NHd.dtype)
        ctx.documents, ctx.kernel, ctx.num_own = documents, kernel, len(scores)
        ctx.save_for_backward(query_NHd, keys_NGd, values_NGd, attended_NHd, normaliser_NH, *scores, *own)
        return attended_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHd: Tensor) -> tuple[Tensor | None, ...]:
        query_NHd, keys_NGd, values_NGd, attended_NHd, normaliser_NH, *rest = ctx.saved_tensors
        scores, own = rest[: ctx.num_own], rest[ctx.num_own :]
        with _given_types(query_NHd):
            in_query_NHd, in_keys, in_values = ctx.kernel.backward(
                gradient_NHd, query_NHd, keys_NGd, values_NGd, attended_NHd, normaliser_NH, ctx.documents
            )
            drift_NH = _inner(gradient_NHd, attended_NHd)
            in_own = []
            for score_NH, key, value in zip(scores, own[::2], own[1::2], strict=True):
                weight_NH = (score_NH - normaliser_NH).exp()
                moved_NH = weight_NH * (_inner(gradient_NHd, _to_heads(value, query_NHd)) - drift_NH)
                in_score_NH1 = (_scale(query_NHd) * moved_NH)[..., None]
                in_query_NHd = in_query_NHd + in_score_NH1 * _to_heads(key, query_NHd)
                in_own += [_summed(in_score_NH1 * query_NHd, key), _summed(weight_NH[..., None] * gradient_NHd, value)]
        return None, in_query_NHd.to(query_NHd.dtype), in_keys, in_values, *in_own


class Kernel(Protocol):
    """Causal attention within each document."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normaliser_NH): the logarithm of the sum of the exponentials of the scores, float32 or wider."""
        ...

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normaliser_NH: Tensor,
        documents: PackedDocuments,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in query, keys and values of a softmax with this output and normaliser."""
        ...


def kernel_for(query_NHd: Tensor) -> type[Kernel]:
    """Return the kernel for states of this device, type and width."""
    flash = (
        query_NHd.device.type == "cuda"
        and query_NHd.dtype in (torch.float16, torch.bfloat16)
        and query_NHd.shape[-1] in FLASH_WIDTHS
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query_NHd.device) >= FLASH_CAPABILITY
    )
    if query_NHd.device.type == "cpu":
        return FlashOnCPU
    return FlashOnCUDA if flash else Pieces


class FlashOnCUDA:
    """PyTorch's flash attention over documents of any lengths."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normaliser_NH)."""
        bounds, longest = documents.bounds, documents.longest
        attended_NHd, normaliser_HN, *_ = torch.ops.aten._flash_attention_forward(
            query_NHd,
            keys_NGd,
            values_NGd,
            cum_seq_q=bounds,
            cum_seq_k=bounds,
            max_q=longest,
            max_k=longest,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
        )
        return attended_NHd, normaliser_HN.T

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normaliser_NH: Tensor,
        documents: PackedDocuments,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in query, keys and values."""
        bounds, longest = documents.bounds, documents.longest
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            gradient_NHd.contiguous(),
            query_NHd,
            keys_NGd,
            values_NGd,
            attended_NHd,
            normaliser_NH.T.contiguous(),
            cum_seq_q=bounds,
            cum_seq_k=bounds,
            max_q=longest,
            max_k=longest,
            dropout_p=0.0,
            is_causal=True,
            # Of a dropout that there is not.
            rng_state=torch.zeros(2, dtype=torch.uint64, device=query_NHd.device),
            unused=torch.empty(0, device=query_NHd.device),
        )
        return gradients


class FlashOnCPU:
    """PyTorch's flash attention for CPUs, one document at a time."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normaliser_NH)."""
        attended_NHd = torch.empty_like(query_NHd)
        normaliser_NH = query_NHd.new_empty(query_NHd.shape[:2], dtype=_wide(query_NHd))
        for own in documents.slices:
            states = (_one(states[own]) for states in (query_NHd, keys_NGd, values_NGd))
            attended_1HMd, normaliser_1HM = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *states, is_causal=True
            )
            attended_NHd[own], normaliser_NH[own] = attended_1HMd[0].transpose(0, 1), normaliser_1HM[0].T
        return attended_NHd, normaliser_NH

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normaliser_NH: Tensor,
        documents: PackedDocuments,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in query, keys and values."""
        found = (torch.empty_like(query_NHd), torch.empty_like(keys_NGd), torch.empty_like(values_NGd))
        for own in documents.slices:
            states = (_one(x[own]) for x in (gradient_NHd, query_NHd, keys_NGd, values_NGd, attended_NHd))
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *states, normaliser_NH[own].T[None], 0.0, True
            )
            for whole, part in zip(found, gradients, strict=True):
                whole[own] = part[0].transpose(0, 1)
        return found


def _one(states_MHd: Tensor) -> Tensor:
    """Return states_1HMd: a batch of one document."""
    return states_MHd.transpose(0, 1)[None]


class Pieces:
    """Matrix products over a piece of a document and the columns up to its end, on every device and in every type."""

    @staticmethod
    def forward(
        query_NHd: Tensor, keys_NGd: Tensor, values_NGd: Tensor, documents: PackedDocuments
    ) -> tuple[Tensor, Tensor]:
        """Return (attended_NHd, normaliser_NH)."""
        attended_NHd = torch.empty_like(query_NHd)
        normaliser_NH1 = query_NHd.new_empty(*query_NHd.shape[:2], 1, dtype=_wide(query_NHd))
        groups = keys_NGd.shape[1]
        behind_QC = _behind(documents, query_NHd, groups)
        for own, seen in documents.pieces:
            scores_GQC = _scores(_by_group(query_NHd[own], groups), keys_NGd[seen].transpose(0, 1), behind_QC)
            highest_GQ1 = scores_GQC.amax(dim=-1, keepdim=True)
            weights_GQC = scores_GQC.sub_(highest_GQ1).exp_()
            sum_GQ1 = weights_GQC.sum(dim=-1, keepdim=True)
            mixed_GQd = weights_GQC.to(values_NGd.dtype) @ values_NGd[seen].transpose(0, 1)
            _write(attended_NHd[own], mixed_GQd / sum_GQ1)
            _write(normaliser_NH1[own], highest_GQ1 + sum_GQ1.log())
        return attended_NHd, normaliser_NH1[..., 0]

    @staticmethod
    def backward(
        gradient_NHd: Tensor,
        query_NHd: Tensor,
        keys_NGd: Tensor,
        values_NGd: Tensor,
        attended_NHd: Tensor,
        normaliser_NH: Tensor,
        documents: PackedDocuments,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in query, keys and values."""
        drift_NH1, normaliser_NH1 = _inner(gradient_NHd, attended_NHd)[..., None], normaliser_NH[..., None]
        in_query = torch.empty_like(query_NHd)
        in_keys, in_values = (torch.zeros_like(states, dtype=_wide(states)) for states in (keys_NGd, values_NGd))
        groups = keys_NGd.shape[1]
        behind_QC = _behind(documents, query_NHd, groups)
        for own, seen in documents.pieces:
            query_GQd, gradient_GQd, normaliser_GQ1, drift_GQ1 = (
                _by_group(states[own], groups) for states in (query_NHd, gradient_NHd, normaliser_NH1, drift_NH1)
            )
            keys_GCd, values_GCd = keys_NGd[seen].transpose(0, 1), values_NGd[seen].transpose(0, 1)
            weights_GQC = _scores(query_GQd, keys_GCd, behind_QC).sub_(normaliser_GQ1).exp_()
            in_values[seen] += (weights_GQC.to(values_GCd.dtype).mT @ gradient_GQd).transpose(0, 1)
            moved_GQC = (gradient_GQd @ values_GCd.mT).to(weights_GQC.dtype).sub_(drift_GQ1)
            in_scores_GQC = moved_GQC.mul_(weights_GQC).to(query_NHd.dtype)
            _write(in_query[own], in_scores_GQC @ keys_GCd * _scale(query_NHd))
            in_keys[seen] += (in_scores_GQC.mT @ query_GQd * _scale(query_NHd)).transpose(0, 1)
        return in_query, in_keys.to(keys_NGd.dtype), in_values.to(values_NGd.dtype)


def _behind(documents: PackedDocuments, query_NHd: Tensor, groups: int) -> Tensor:
    """Return what is added to the scores of a piece at the end of the longest document: -inf at the columns behind a query.

    Of a smaller piece and fewer columns it is the corner, the last of both.
    """
    slots = documents.largest_piece
    behind_SC = query_NHd.new_zeros(slots, documents.longest)
    behind_SC[:, -slots:] = query_NHd.new_full((slots, slots), -torch.inf).triu(1)
    return behind_SC.repeat_interleave(query_NHd.shape[1] // groups, dim=0)


def _scores(query_GQd: Tensor, keys_GCd: Tensor, behind_QC: Tensor) -> Tensor:
    """Return scores_GQC of a piece, float32 or wider."""
    corner_QC = behind_QC[-query_GQd.shape[1] :, -keys_GCd.shape[1] :]
    scores_GQC = torch.baddbmm(corner_QC[None], query_GQd, keys_GCd.mT, alpha=_scale(query_GQd))
    return scores_GQC.to(_wide(query_GQd))


def _by_group(states_SHd: Tensor, groups: int) -> Tensor:
    """Return states_GQd: the queries of each key-value head, one after another."""
    return states_SHd.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _write(states_SHd: Tensor, states_GQd: Tensor) -> None:
    """Write what `_by_group` laid out to where it came from."""
    groups = len(states_GQd)
    states_SHd.unflatten(1, (groups, -1)).copy_(states_GQd.unflatten(1, (len(states_SHd), -1)).transpose(0, 1))


def _slots(states_BHTd: Tensor) -> Tensor:
    """Return states_NHd."""
    return states_BHTd.transpose(1, 2).flatten(0, 1)


def _to_heads(states_NGd: Tensor, query_NHd: Tensor) -> Tensor:
    """Return states_NHd: each key-value head once for each of its queries."""
    return states_NGd.repeat_interleave(query_NHd.shape[1] // states_NGd.shape[1], dim=1)


def _summed(states_NHd: Tensor, like_NGd: Tensor) -> Tensor:
    """Return states_NGd: the sum over the queries of each key-value head."""
    return states_NHd.unflatten(1, (like_NGd.shape[1], -1)).sum(dim=2).to(like_NGd.dtype)


def _inner(left_NHd: Tensor, right_NHd: Tensor) -> Tensor:
    """Return the inner product of each pair, float32 or wider."""
    return (left_NHd.to(_wide(left_NHd)) * right_NHd).sum(dim=-1)


def _scale(query_NHd: Tensor) -> float:
    return 1 / math.sqrt(query_NHd.shape[-1])


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _given_types(like: Tensor) -> torch.autocast:
    """Return the context in which nothing is cast: autocast would round scores that are wide on purpose."""
    return torch.autocast(like.device.type, enabled=False)
