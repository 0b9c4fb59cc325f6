"""What the target knows of the records that training will read, stored so that a step need not run the target.

N = rows, V = vocabulary, D = hidden, K = tokens of a top-k row
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json, written_beside
from drafttrain.core.records import DraftBatch, TargetNeeds
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.store import Store
from drafttrain.target import Target
from drafttrain.target.anatomy import head_logits

TOKENS_A_SHARD = 16_384
TOKENS_A_BATCH = 4096


class RowCache:
    """Rows of one store: for each cached record, one row a token but the last: the law of the token after it.

    `states` keeps the final hidden states and lets the target's own head make the whole law of them; `full` keeps logits;
    `top_k` keeps the largest log-probabilities, and spreads the mass of the tail evenly over the other tokens.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        about = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        self.kind: str = about["kind"]
        self._model = target.model
        self._num_tokens: int = about["num_tokens"]
        self._starts: dict[int, int] = {int(record): start for record, start in about["starts"].items()}
        self._shard_starts = [int(start) for start in about["shard_starts"]]
        self._shards = [
            {
                name: np.load(folder / f"{name}-{i:05d}.npy", mmap_mode="r", allow_pickle=False)
                for name in about["arrays"]
            }
            for i in range(len(self._shard_starts))
        ]

    def has(self, record: int) -> bool:
        """Tell whether the record's rows are stored."""
        return record in self._starts

    def stored(self, record: int, count: int) -> dict[str, Tensor]:
        """Return the arrays of the first `count` rows of a record as they were written."""
        start = self._starts[record]
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        begin = start - self._shard_starts[shard]
        return {
            name: torch.from_numpy(np.array(array[begin : begin + count]))
            for name, array in self._shards[shard].items()
        }

    def logits(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return logits_NV (or log-probabilities) of stored rows."""
        if self.kind == "full":
            return stored["logits"]
        if self.kind == "states":
            with torch.no_grad():
                device = next(self._model.parameters()).device
                return head_logits(self._model, stored["states"].to(device, self._model.dtype))
        ids_NK, log_probs_NK = stored["ids"].long(), stored["log_probs"]
        others = self._num_tokens - ids_NK.shape[1]
        tail_N = stored["tail"].clamp_min(1e-30)
        fill_NV = (tail_N / max(1, others)).log()[:, None].expand(-1, self._num_tokens)
        return fill_NV.scatter(1, ids_NK, log_probs_NK)


class CachedRows:
    """The target's law over a micro-batch, from stored rows."""

    def __init__(self, cache: RowCache, arrays: Mapping[str, Tensor], row_of_position: Tensor) -> None:
        self._cache = cache
        self._arrays = arrays
        self._row_of_position = row_of_position

    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV of the token after each flat position."""
        rows_N = self._row_of_position[index_N.cpu()]
        stored = {name: array[rows_N] for name, array in self._arrays.items()}
        return self._cache.logits(stored).to(index_N.device)


def cached_rows(
    batch: DraftBatch,
    places: Sequence[tuple[int, int]],
    members: Sequence[tuple[RowCache, int, int]],
) -> CachedRows:
    """Return the rows of a packed batch.

    Args:
        places: Where each record begins in the batch.
        members: For each record its cache, its number there, and its rows; all caches of one kind.
    """
    width = batch.tokens_BT.shape[1]
    row_of_position = torch.full((batch.tokens_BT.numel(),), -1, dtype=torch.long)
    pieces: list[dict[str, Tensor]] = []
    taken = 0
    for (row, column), (cache, record, count) in zip(places, members, strict=True):
        pieces.append(cache.stored(record, count))
        start = row * width + column
        row_of_position[start : start + count] = torch.arange(taken, taken + count)
        taken += count
    arrays = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return CachedRows(members[0][0], arrays, row_of_position)


def build_cache(
    folder: Path, store: Store, records: Sequence[int], target: Target, *, kind: str, top_k: int, max_gb: float
) -> RowCache:
    """Write the rows of these records, shard by shard; shards that an earlier run wrote stay.

    Raises:
        DataError: The cache would be larger than `max_gb`. Nothing was written.
    """
    sizes = [int(store.starts[i + 1] - store.starts[i]) - 1 for i in records]
    total = sum(sizes) * _bytes_a_row(kind, target, top_k)
    say(f"cache of the target's rows ({kind}): {len(records):,} records, {sum(sizes):,} rows, {total / 1e9:.2f} GB")
    if total > max_gb * 1e9:
        raise DataError(
            f"data.cache {kind!r} needs {total / 1e9:.2f} GB, data.max_cache_gb allows {max_gb:g}. Choose top_k or states, "
            "fewer records, or a higher bound."
        )
    shards = _shards(records, sizes)
    about = {
        "kind": kind,
        "top_k": top_k,
        "target_fingerprint": target.fingerprint,
        "num_tokens": target.num_tokens,
        "store": store.meta["about"],
        "records": list(map(int, records)),
    }
    _check_plan(folder, about)
    arrays = {"full": ["logits"], "states": ["states"], "top_k": ["ids", "log_probs", "tail"]}[kind]
    with progress("caching the target's rows", total=sum(sizes), unit="rows") as bar:
        for number, shard in enumerate(shards):
            paths = {name: folder / f"{name}-{number:05d}.npy" for name in arrays}
            if not all(path.exists() for path in paths.values()):
                rows = _rows([store[i].tokens for i in shard], target, kind=kind, top_k=top_k)
                for name, path in paths.items():
                    with written_beside(path) as temporary, temporary.open("wb") as file:
                        np.save(file, rows[name])
            bar.advance(sum(int(store.starts[i + 1] - store.starts[i]) - 1 for i in shard))
    starts = dict(zip(map(int, records), np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
    shard_starts = [starts[int(shard[0])] for shard in shards]
    write_json(folder / "cache.json", about | {"arrays": arrays, "starts": starts, "shard_starts": shard_starts})
    return RowCache(folder, target)


def _check_plan(folder: Path, about: dict[str, Any]) -> None:
    """Keep shards of the same plan; drop those of another."""
    path = folder / "plan.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(about)):
        for stale in [*folder.glob("*.npy"), folder / "cache.json"]:
            stale.unlink(missing_ok=True)
    write_json(path, about)


def _bytes_a_row(kind: str, target: Target, top_k: int) -> int:
    width = int(target.model.get_output_embeddings().weight.shape[1])
    return {"full": 4 * target.num_tokens, "states": 4 * width, "top_k": 8 * top_k + 4}[kind]


def _shards(records: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    shards: list[list[int]] = [[]]
    held = 0
    for record, size in zip(records, sizes, strict=True):
        if held + size > TOKENS_A_SHARD and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(int(record))
        held += size
    return [shard for shard in shards if shard]


@torch.no_grad()
def _rows(texts: Sequence[Sequence[int]], target: Target, *, kind: str, top_k: int) -> dict[str, Any]:
    """Return the arrays of some records, one after the other."""
    from drafttrain.core.records import Record

    made: dict[str, list[Any]] = {}
    batch: list[Sequence[int]] = []
    groups: list[list[Sequence[int]]] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > TOKENS_A_BATCH:
            groups.append(batch)
            batch = []
        batch.append(text)
    groups.append(batch)
    for group in groups:
        width = max(map(len, group))
        records = [Record("", text, [True] * len(text)) for text in group]
        packed, places = pack(records, width=width, weight_of_step=1.0)
        seen = target.read(packed.tokens_BT, packed.positions_BT, TargetNeeds(final=True))
        assert seen.final_BTD is not None
        for (row, column), text in zip(places, group, strict=True):
            states_ND = seen.final_BTD[row, column : column + len(text) - 1]
            for name, array in _arrays(states_ND, target, kind=kind, top_k=top_k).items():
                made.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in made.items()}


def _arrays(states_ND: Tensor, target: Target, *, kind: str, top_k: int) -> dict[str, Any]:
    if kind == "states":
        return {"states": states_ND.float().cpu().numpy()}
    logits_NV = head_logits(target.model, states_ND)[:, : target.num_tokens].float()
    if kind == "full":
        return {"logits": logits_NV.cpu().numpy()}
    log_probs_NV = logits_NV.log_softmax(-1)
    top = log_probs_NV.topk(min(top_k, target.num_tokens), dim=-1)
    tail_N = (1 - top.values.double().exp().sum(-1)).clamp_min(0).float()
    return {
        "ids": top.indices.int().cpu().numpy(),
        "log_probs": top.values.cpu().numpy(),
        "tail": tail_N.cpu().numpy(),
    }
