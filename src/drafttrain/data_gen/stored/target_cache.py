"""Cached target outputs on the records that training will read, so that a step need not run the target.

B = sequences, T = positions, R = B * T, N = rows, V = vocabulary, D = hidden, K = tokens of a top-k row
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json, written_beside
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.groups import TOKENS_STORED, TOKENS_STORED_ON_CPU, groups, groups_in_order
from drafttrain.data_gen.stored.wanted import SUMS, Wanted, with_arrays
from drafttrain.distributed.collectives import any_of, first_before_others, own_share, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_logits

TOKENS_A_SHARD = 16_384


class Texts(Protocol):
    """Encoded records by number: a store, or texts in memory."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """With `about`: what the content depends on."""
        ...

    @property
    def starts(self) -> Any:
        """Where each record begins in the joined tokens, and the end."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Return a record."""
        ...


class RowCache:
    """Cached target outputs of one store: one row a token, with the states there and the distribution of the next token.

    `states` stores final states, from which the target's own head computes the exact distribution; `full` stores logits; `top_k`
    stores the largest log-probabilities and spreads the rest of the probability evenly over the other tokens.
    """

    def __init__(self, folder: Path, target: Target, wanted: Wanted) -> None:
        about = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        self.wanted = wanted
        self._folder = folder
        self._model = target.model
        self._num_tokens: int = about["num_tokens"]
        self._starts: dict[int, int] = {int(record): start for record, start in about["starts"].items()}
        self._shard_starts = [int(start) for start in about["shard_starts"]]
        with_sums = "final" in about["arrays"] and all(self.has_sums(i) for i in range(self.num_shards))
        self._sums = SUMS if with_sums else ()
        self._shards = [
            {
                name: np.load(self.path(name, i), mmap_mode="r", allow_pickle=False)
                for name in (*about["arrays"], *self._sums)
            }
            for i in range(self.num_shards)
        ]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shard_starts)

    def path(self, name: str, shard: int) -> Path:
        """Return the file of an array of a shard."""
        return self._folder / f"{name}-{shard:05d}.npy"

    def has_sums(self, shard: int) -> bool:
        """Return whether the sums over the target's vocabulary are stored for a shard."""
        return all(self.path(name, shard).exists() for name in SUMS)

    def records_of(self, shard: int) -> list[int]:
        """Return the records of a shard in the order of their rows."""
        ends = [*self._shard_starts[1:], math.inf]
        in_order = sorted(self._starts, key=self._starts.__getitem__)
        return [record for record in in_order if self._shard_starts[shard] <= self._starts[record] < ends[shard]]

    def final(self, shard: int) -> Tensor:
        """Return final_ND of a shard."""
        return _as_tensor(np.array(self._shards[shard]["final"]), self.wanted.dtype)

    @property
    def batch_arrays(self) -> list[str]:
        """Names of the arrays that a batch carries."""
        return [*self.wanted.arrays, *(self._sums if self.wanted.distribution == "states" else ())]

    def has(self, record: int) -> bool:
        """Return whether the record's rows are stored."""
        return record in self._starts

    def stored(self, record: int, count: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return arrays of the first `count` rows of a record, in their stored types.

        Args:
            names: Arrays to read; None: all.
        """
        chosen = self.wanted.arrays if names is None else names
        return {name: _as_tensor(np.array(self.rows(name, record, count)), self.wanted.dtype) for name in chosen}

    def rows(self, name: str, record: int, count: int) -> Any:
        """Return the first rows of a record of one array, memory-mapped."""
        start = self._starts[record]
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        begin = start - self._shard_starts[shard]
        return self._shards[shard][name][begin : begin + count]

    def with_arrays(self, batch: DraftBatch, arrays: Mapping[str, Tensor]) -> DraftBatch:
        """Return a batch with these arrays, laid out like it, as the target's outputs."""
        return with_arrays(batch, arrays, self.wanted, self._model, num_tokens=self._num_tokens)


def with_stored(
    batch: DraftBatch,
    places: Sequence[tuple[int, int]],
    members: Sequence[tuple[RowCache, int, int]],
) -> DraftBatch:
    """Return a packed batch with the stored target outputs, in their stored types.

    Args:
        places: Where each record begins in the batch.
        members: For each record its cache, its number there, and its number of tokens; all caches store the same outputs.
    """
    cache = members[0][0]
    arrays = {name: _laid_out(name, batch.tokens_BT.shape, places, members) for name in cache.batch_arrays}
    return cache.with_arrays(batch, arrays)


def _laid_out(
    name: str,
    shape: tuple[int, ...],
    places: Sequence[tuple[int, int]],
    members: Sequence[tuple[RowCache, int, int]],
) -> Tensor:
    """Return one array laid out like the batch; 0 at padding."""
    cache, record, count = members[0]
    like = cache.rows(name, record, count)
    # numpy copies in this thread; torch would start more threads beside those that compute.
    array = np.zeros((*shape, *like.shape[1:]), like.dtype)
    for (row, column), (cache, record, count) in zip(places, members, strict=True):
        array[row, column : column + count] = cache.rows(name, record, count)
    return _as_tensor(array, cache.wanted.dtype)


def build_cache(
    folder: Path, store: Texts, records: Sequence[int], target: Target, *, wanted: Wanted, max_gb: float
) -> RowCache:
    """Write the wanted outputs of these records, shard by shard; shards of an earlier run are kept.

    Raises:
        DataError: The cache would be larger than `max_gb`. Nothing was written.
    """
    sizes = [int(store.starts[i + 1] - store.starts[i]) for i in records]
    total = sum(sizes) * wanted.bytes_a_row(target)
    say(f"cache of the target's {wanted}: {len(records):,} records, {sum(sizes):,} tokens, {total / 1e9:.2f} GB")
    if total > max_gb * 1e9:
        raise DataError(
            f"data.cache needs {total / 1e9:.2f} GB for the target's {wanted}, data.max_cache_gb allows {max_gb:g}. "
            "Choose top_k or states, cache_dtype bfloat16, fewer records, or a higher limit."
        )
    shards = _shards(records, sizes)
    about = {
        "wanted": asdict(wanted),
        "target_fingerprint": target.fingerprint,
        "num_tokens": target.num_tokens,
        "store": store.meta["about"],
        "records": list(map(int, records)),
    }
    with first_before_others("it checks the cache"):
        _check_plan(folder, about)
    paths = [{name: folder / f"{name}-{number:05d}.npy" for name in wanted.arrays} for number in range(len(shards))]
    missing = [number for number in range(len(shards)) if not all(path.exists() for path in paths[number].values())]
    own = own_share(missing)
    size_of = dict(zip(map(int, records), sizes, strict=True))
    tokens = [sum(size_of[i] for i in shard) for shard in shards]
    if any_of(bool(own)):
        bar_of = progress("caching target outputs", total=sum(tokens[n] for n in own), unit="tokens")
        with target.for_own_share() as live, bar_of as bar:
            for number in own:
                rows = _rows([store[i].tokens for i in shards[number]], live, wanted, read=bar.advance)
                for name, path in paths[number].items():
                    with written_beside(path) as temporary, temporary.open("wb") as file:
                        np.save(file, rows[name])
    wait_for_all("the cache is written")
    starts = dict(zip(map(int, records), np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
    shard_starts = [starts[int(shard[0])] for shard in shards]
    content = about | {"arrays": wanted.arrays, "starts": starts, "shard_starts": shard_starts}
    with first_before_others("it completes the cache"):
        if is_first():
            write_json(folder / "cache.json", content)
    return RowCache(folder, target, wanted)


def _check_plan(folder: Path, about: dict[str, Any]) -> None:
    """Keep shards of the same plan; remove those of another."""
    path = folder / "plan.json"
    if path.exists() and not _same_plan(json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(about))):
        for stale in [*folder.glob("*.npy"), folder / "cache.json"]:
            stale.unlink(missing_ok=True)
    write_json(path, about)


def _same_plan(one: dict[str, Any], other: dict[str, Any]) -> bool:
    # Earlier versions wrote another name for `distribution`: the wanted outputs are compared by value, in their order.
    wanted = [list(plan["wanted"].values()) for plan in (one, other)]
    return wanted[0] == wanted[1] and one | {"wanted": None} == other | {"wanted": None}


def _shards(records: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    return [[int(records[i]) for i in group] for group in groups_in_order(sizes, tokens=TOKENS_A_SHARD)]


@torch.no_grad()
def _rows(
    texts: Sequence[Sequence[int]], target: Target, wanted: Wanted, *, read: Callable[[int], None]
) -> dict[str, Any]:
    """Return the arrays of some records, joined in their order.

    Texts of similar lengths are read together, each in a row of its own: a plain causal mask is right, and little is padding.

    Args:
        read: Called after every call of the target with the number of tokens that it read.
    """
    made: list[dict[str, Any]] = [{}] * len(texts)
    needs = wanted.states | TargetNeeds(final=wanted.final or wanted.distribution is not None)
    tokens = TOKENS_STORED_ON_CPU if target.device.type == "cpu" else TOKENS_STORED
    for numbers in groups([len(text) for text in texts], tokens=tokens):
        group = [texts[i] for i in numbers]
        seen = target.read(*_side_by_side(group), needs)
        for row, (number, text) in enumerate(zip(numbers, group, strict=True)):
            made[number] = _arrays(seen, (row, slice(len(text))), target, wanted)
        read(sum(map(len, group)))
    return {name: np.concatenate([arrays[name] for arrays in made]) for name in wanted.arrays}


def _side_by_side(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (tokens_BT, positions_BT), a text a row. Positions count on in the padding: it needs no mask."""
    width = max(map(len, texts))
    tokens_BT = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    return tokens_BT, torch.arange(width).expand_as(tokens_BT)


def _arrays(seen: TargetOutput, span: tuple[int, slice], target: Target, wanted: Wanted) -> dict[str, Any]:
    """Return the arrays of one record of a batch."""
    arrays = {f"hidden_{index}": _as_array(state[span], wanted.dtype) for index, state in seen.hidden_BTD.items()}
    if seen.final_BTD is None:
        return arrays
    if wanted.final:
        arrays["final"] = _as_array(seen.final_BTD[span], wanted.dtype)
    return arrays | _distribution(seen.final_BTD[span], target, wanted)


def _distribution(final_ND: Tensor, target: Target, wanted: Wanted) -> dict[str, Any]:
    if wanted.distribution in (None, "states"):
        return {}
    logits_NV = head_logits(target.model, final_ND)[:, : target.num_tokens].float()
    if wanted.distribution == "full":
        return {"logits": logits_NV.cpu().numpy()}
    log_probs_NV = logits_NV.log_softmax(-1)
    top = log_probs_NV.topk(min(wanted.top_k, target.num_tokens), dim=-1)
    tail_N = (1 - top.values.double().exp().sum(-1)).clamp_min(0).float()
    return {
        "ids": top.indices.int().cpu().numpy(),
        "log_probs": top.values.cpu().numpy(),
        "tail": tail_N.cpu().numpy(),
    }


def _as_array(states_ND: Tensor, dtype: str) -> Any:
    """Return states as a numpy array; numpy has no bfloat16, so its bits are stored as int16."""
    stored_ND = states_ND.to(getattr(torch, dtype)).cpu()
    if not torch.isfinite(stored_ND).all():
        raise DataError(f"data.cache_dtype: a state of the target overflows {dtype}: choose bfloat16 or float32")
    return stored_ND.view(torch.int16).numpy() if dtype == "bfloat16" else stored_ND.numpy()


def _as_tensor(array: Any, dtype: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" and tensor.dtype == torch.int16 else tensor
