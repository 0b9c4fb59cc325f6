"""The target's distribution from serving logs, stored with the records; the training step reads it instead of running the target.

N = rows (labels), K = tokens named in a row, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.target_rows import NamedRows
from drafttrain.core.texts import LoggedDistribution, Record

FILES = ("law_ids.npy", "law_log_probs.npy", "law_starts.npy")
LEAST = 1e-30
"""Smallest probability of a tail, so that its logarithm is finite."""


class DistributionStore:
    """The logged distributions of a store's records, by number."""

    def __init__(self, folder: Path) -> None:
        self._ids, self._log_probs, self._starts = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in FILES
        )

    @staticmethod
    def open(folder: Path) -> DistributionStore | None:
        """Return the distributions stored in a folder; None: there are none."""
        return DistributionStore(folder) if (folder / FILES[0]).exists() else None

    def has(self, record: int) -> bool:
        """Return whether a record has logged distributions at its labels."""
        return bool(self._starts[record] < self._starts[record + 1])

    def __getitem__(self, record: int) -> LoggedDistribution | None:
        if not self.has(record):
            return None
        rows = slice(self._starts[record], self._starts[record + 1])
        return LoggedDistribution(np.array(self._ids[rows]), np.array(self._log_probs[rows]))


def write_distributions(folder: Path, logged: Sequence[LoggedDistribution | None]) -> dict[str, Any]:
    """Write the logged distributions of a store's records and return their statistics; without any, write and return nothing."""
    known = [one for one in logged if one is not None]
    if not known:
        return {}
    width = max(one.ids_NK.shape[1] for one in known)
    ids_NK = np.concatenate([_widened(one.ids_NK, width, -1) for one in known])
    log_probs_NK = np.concatenate([_widened(one.log_probs_NK, width, -np.inf) for one in known])
    counts = [0 if one is None else len(one.ids_NK) for one in logged]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    for name, array in zip(FILES, (ids_NK, log_probs_NK, starts), strict=True):
        np.save(folder / name, array)
    tail_N = np.clip(1 - np.exp(log_probs_NK.astype(np.float64)).sum(axis=1), 0, None)
    return {
        "records": len(known),
        "rows": len(ids_NK),
        "named_tokens": width,
        "mean_tail_mass": float(tail_N.mean()),
        "largest_tail_mass": float(tail_N.max()),
    }


class LoggedRows:
    """The target's distribution over a micro-batch whose records all have a logged one."""

    def __init__(self, ids_NK: Tensor, log_probs_NK: Tensor, row_of_position: Tensor, *, num_tokens: int) -> None:
        self._ids_NK = ids_NK
        self._log_probs_NK = log_probs_NK
        self._row_of_position = row_of_position
        self._num_tokens = num_tokens

    def each(self, change: Callable[[Tensor], Tensor]) -> LoggedRows:
        """Return a copy with `change` applied to every tensor (moved, pinned)."""
        return LoggedRows(
            change(self._ids_NK),
            change(self._log_probs_NK),
            change(self._row_of_position),
            num_tokens=self._num_tokens,
        )

    def named(self, index_N: Tensor) -> NamedRows:
        """Return the logged distribution of the token after each flat position."""
        rows_N = self._row_of_position[index_N]
        return NamedRows(self._ids_NK[rows_N], self._log_probs_NK[rows_N])

    def at(self, index_N: Tensor) -> Tensor:
        """Return log-probabilities over the vocabulary, the tail spread evenly: for drafters with their own vocabulary."""
        named = self.named(index_N)
        others_N = (self._num_tokens - (named.ids_NK >= 0).sum(-1)).clamp_min(1)
        fill_N = (named.tail_N.clamp_min(LEAST) / others_N).log()
        fill_NV = fill_N[:, None].repeat(1, self._num_tokens + 1)
        # Unused places are scattered into one extra column, which is cut off.
        where_NK = torch.where(named.ids_NK >= 0, named.ids_NK, self._num_tokens)
        return fill_NV.scatter(1, where_NK, named.log_probs_NK)[:, : self._num_tokens]


def with_logged(
    batch: DraftBatch,
    places: Sequence[tuple[int, int]],
    records: Sequence[Record],
    logged: Sequence[LoggedDistribution],
    *,
    num_tokens: int,
) -> DraftBatch:
    """Return a packed batch with the logged distributions of its records.

    Args:
        places: Where each record begins in the batch.
    """
    width = batch.tokens_BT.shape[1]
    row_of_position = torch.full((batch.tokens_BT.numel(),), -1, dtype=torch.long)
    taken, most = 0, max(one.ids_NK.shape[1] for one in logged)
    for (row, column), record, one in zip(places, records, logged, strict=True):
        labels = np.flatnonzero(record.loss_mask)
        # The distribution of a label is at the position before it.
        row_of_position[row * width + column + torch.from_numpy(labels) - 1] = torch.arange(taken, taken + len(labels))
        taken += len(one.ids_NK)
    ids_NK = torch.from_numpy(np.concatenate([_widened(one.ids_NK, most, -1) for one in logged])).long()
    log_probs_NK = torch.from_numpy(np.concatenate([_widened(one.log_probs_NK, most, -np.inf) for one in logged]))
    rows = LoggedRows(ids_NK, log_probs_NK, row_of_position, num_tokens=num_tokens)
    return replace(batch, target_rows=rows)


def _widened(rows_NK: np.ndarray[Any, Any], width: int, value: float) -> np.ndarray[Any, Any]:
    return np.pad(rows_NK, ((0, 0), (0, width - rows_NK.shape[1])), constant_values=value)
