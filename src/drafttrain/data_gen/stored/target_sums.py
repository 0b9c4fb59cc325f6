"""What cached final states say about the whole vocabulary: the likeliest token and the logarithm of the sum over all tokens.

With these two numbers a row a training step computes only the logits of the drafter's own vocabulary.

N = rows, P = rows with padding, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.console import progress
from drafttrain.core.few_sizes import in_few_sizes
from drafttrain.core.files import written_beside
from drafttrain.core.probability import likeliest, log_total
from drafttrain.data_gen.stored.target_cache import SUMS, RowCache, Texts
from drafttrain.distributed.collectives import own_share, wait_for_all
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_logits

ROWS_AT_ONCE = 256


def add_sums(cache: RowCache, store: Texts, target: Target) -> None:
    """Write the sums of every shard that lacks them, from its final states. The target's blocks are not run.

    They are computed where the next token is a label: a loss reads no other rows.
    """
    missing = [number for number in range(cache.num_shards) if not cache.has_sums(number)]
    own = own_share(missing)
    if own:
        total = sum(len(cache.final(number)) for number in own)
        with progress("caching sums over the target's vocabulary", total=total, unit="tokens") as bar:
            for number in own:
                labels_N = _next_is_label(cache, store, number)
                found = _sums(cache.final(number), labels_N, target)
                for name in SUMS:
                    with written_beside(cache.path(name, number)) as temporary, temporary.open("wb") as file:
                        np.save(file, found[name])
                bar.advance(len(labels_N))
    wait_for_all("the sums over the target's vocabulary are written")


def _next_is_label(cache: RowCache, store: Texts, shard: int) -> Any:
    masks = [np.asarray(store[record].loss_mask, dtype=bool) for record in cache.records_of(shard)]
    return np.concatenate([np.append(mask[1:], False) for mask in masks])


@torch.no_grad()
def _sums(final_ND: Tensor, labels_N: Any, target: Target) -> dict[str, Any]:
    likeliest_N, log_total_N = np.full(len(labels_N), -1, np.int32), np.full(len(labels_N), np.nan, np.float32)
    for index_n in _in_parts(labels_N.nonzero()[0]):
        states_PD = in_few_sizes(final_ND[torch.from_numpy(index_n)].to(target.device, target.model.dtype))
        logits_nV = head_logits(target.model, states_PD)[: len(index_n), : target.num_tokens]
        likeliest_N[index_n] = likeliest(logits_nV).int().cpu().numpy()
        log_total_N[index_n] = log_total(logits_nV).float().cpu().numpy()
    return {"likeliest": likeliest_N, "log_total": log_total_N}


def _in_parts(index_N: Any) -> Iterator[Any]:
    for first in range(0, len(index_N), ROWS_AT_ONCE):
        yield index_N[first : first + ROWS_AT_ONCE]
