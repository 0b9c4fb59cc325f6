"""What cached final states say about the whole vocabulary: the likeliest token and the logarithm of the sum over all tokens.

With these two numbers a row a training step computes only the logits of the drafter's own vocabulary.

N = rows, P = rows with padding, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.console import progress
from drafttrain.core.eight_bit import as_states
from drafttrain.core.few_sizes import in_few_sizes
from drafttrain.core.probability import likeliest, log_total
from drafttrain.data_gen.stored.cache_writer import MoreOfShard, Texts
from drafttrain.data_gen.stored.row_layout import RowLayout
from drafttrain.data_gen.stored.stored_states import as_tensor
from drafttrain.data_gen.stored.target_cache import RowCache
from drafttrain.data_gen.stored.wanted import SUMS, Wanted
from drafttrain.distributed.collectives import own_share, wait_for_all
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_logits

ROWS_AT_ONCE = 256


def add_sums(cache: RowCache, store: Texts, target: Target) -> None:
    """Write the sums of every shard that lacks them, from its final states. The target's blocks are not run.

    They are computed where the next token is a label: a loss reads no other rows.
    """
    missing = [number for number, files in enumerate(cache.files) if not files.holds(SUMS)]
    own = own_share(missing)
    if own:
        total = sum(cache.layout.rows_of(number) for number in own)
        labels = _next_is_label(cache.layout, store, own)
        with progress("caching sums over the target's vocabulary", total=total, unit="tokens") as bar:
            for number in own:
                cache.files[number].write(_sums(cache.shard("final", number), labels[number], target), {})
                bar.advance(len(labels[number]))
    wait_for_all("the sums over the target's vocabulary are written")


def sums_of_shards(store: Texts, wanted: Wanted) -> MoreOfShard:
    """Return the function that computes the sums of a shard while it is written."""
    labels: dict[int, Any] = {}

    def sums(layout: RowLayout, number: int, rows: Mapping[str, Any], target: Target) -> Mapping[str, Any]:
        if not labels:
            labels.update(_next_is_label(layout, store, range(len(layout.shards))))
        return _sums(as_tensor(rows["final"], wanted.dtype), labels[number], target)

    return sums


def _next_is_label(layout: RowLayout, store: Texts, shards: Iterable[int]) -> dict[int, Any]:
    """Return for each shard whether the token after a row is a label of any record that has the row."""
    found = {number: np.zeros(layout.rows_of(number), dtype=bool) for number in shards}
    for record in layout.sizes:
        labels_T = np.append(np.asarray(store[record].loss_mask, dtype=bool)[1:], False)
        for piece in layout.pieces(record):
            number, begin = layout.place(piece.owner)
            if number in found:
                begin += piece.first - layout.skipped(piece.owner)
                found[number][begin : begin + piece.end - piece.first] |= labels_T[piece.first : piece.end]
    return found


@torch.no_grad()
def _sums(final_ND: Tensor, labels_N: Any, target: Target) -> dict[str, Any]:
    likeliest_N, log_total_N = np.full(len(labels_N), -1, np.int32), np.full(len(labels_N), np.nan, np.float32)
    for index_n in _in_parts(labels_N.nonzero()[0]):
        states_nD = as_states(final_ND[torch.from_numpy(index_n)].to(target.device))
        states_PD = in_few_sizes(states_nD.to(target.model.dtype))
        logits_nV = head_logits(target.model, states_PD)[: len(index_n), : target.num_tokens]
        likeliest_N[index_n] = likeliest(logits_nV).int().cpu().numpy()
        log_total_N[index_n] = log_total(logits_nV).float().cpu().numpy()
    return {"likeliest": likeliest_N, "log_total": log_total_N}


def _in_parts(index_N: Any) -> Iterator[Any]:
    for first in range(0, len(index_N), ROWS_AT_ONCE):
        yield index_N[first : first + ROWS_AT_ONCE]
