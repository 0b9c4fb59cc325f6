"""Writes cached target outputs, shard by shard. A run that was stopped writes the shards that are missing.

B = sequences, T = positions, N = rows, V = vocabulary, D = hidden
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json
from drafttrain.core.images import PlacedImages
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.groups import TOKENS_STORED, TOKENS_STORED_ON_CPU, groups
from drafttrain.data_gen.stored.arriving import Arriving
from drafttrain.data_gen.stored.row_layout import RowLayout, shared_beginnings
from drafttrain.data_gen.stored.stored_states import Cost, as_array, split_rows, states_as
from drafttrain.data_gen.stored.target_cache import RowCache, shard_files
from drafttrain.data_gen.stored.wanted import SUMS, Wanted
from drafttrain.distributed.collectives import any_of, first_before_others, own_share, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_logits

MoreOfShard = Callable[[RowLayout, int, Mapping[str, Any], Target], Mapping[str, Any]]
"""Returns further arrays of a shard, by its number, its arrays and the target that computed them."""


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


def build_cache(
    folder: Path,
    store: Texts,
    records: Sequence[int],
    target: Target,
    *,
    wanted: Wanted,
    max_gb: float,
    more: MoreOfShard | None = None,
    arriving: Arriving | None = None,
) -> RowCache:
    """Write the wanted outputs of these records, shard by shard; shards of an earlier run are kept.

    Args:
        records: In the order in which training needs them first: shards are written in that order.
        more: Further arrays of a shard.
        arriving: Another process writes the shards: only incomplete ones are removed here.

    Raises:
        DataError: The cache would be larger than `max_gb`: nothing was written. Or the disk is full: whole shards stay.
    """
    layout, about = _planned(folder, store, records, target, wanted)
    _announce(layout, wanted, target, max_gb=max_gb)
    with first_before_others("it checks the cache"):
        _check_plan(folder, about)
    files = shard_files(folder, layout)
    arrays = wanted.empty((1,), target)
    one_row = {name: as_array(array) for name, array in arrays.items()}
    missing = [
        number
        for number, one in enumerate(files)
        if not one.has({name: ((layout.rows_of(number), *row.shape[1:]), row.dtype) for name, row in one_row.items()})
    ]
    if arriving is not None:
        with first_before_others("it removes incomplete shards of the cache"):
            for number in missing if is_first() else ():
                files[number].clear()
        names = [*wanted.arrays, *(SUMS if more is not None else ())]
        arriving.missing += sum(not one.holds(names) for one in files)
        return RowCache(folder, target, wanted, layout=layout, arriving=arriving, with_sums=more is not None)
    own = own_share(missing)
    if any_of(bool(own)):
        total = sum(layout.sizes[record] for number in own for record in layout.shards[number])
        bar_of = progress("caching target outputs", total=total, unit="tokens")
        with target.for_own_share() as live, bar_of as bar:
            for number in own:
                shard = layout.shards[number]
                texts, skipped = [store[i] for i in shard], [layout.skipped(i) for i in shard]
                rows, cost = rows_of_texts(texts, live, wanted, skipped=skipped, read=bar.advance)
                further = more(layout, number, rows, live) if more is not None else {}
                files[number].clear()
                files[number].write({**rows, **further}, {"cost": asdict(cost)})
    wait_for_all("the cache is written")
    cost = Cost.of_shards(one.about() for one in files)
    with first_before_others("it completes the cache"):
        if is_first():
            content = {"arrays": wanted.arrays, "sizes": list(layout.sizes.values()), "cost": asdict(cost)}
            write_json(folder / "cache.json", about | content)
    if cost.worst:
        say(f"cache of the target's {wanted} in {wanted.dtype}: costs at most {cost}")
    return RowCache(folder, target, wanted)


def _planned(
    folder: Path, store: Texts, records: Sequence[int], target: Target, wanted: Wanted
) -> tuple[RowLayout, dict[str, Any]]:
    """Return where rows are stored, and what they depend on. A cache of the same records keeps its order."""
    numbers = list(map(int, records))
    sizes = {i: int(store.starts[i + 1] - store.starts[i]) for i in numbers}
    shared = shared_beginnings({i: _as_compared(store[i], target) for i in numbers})
    path = folder / "plan.json"
    held = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    order = held if set(held) == set(numbers) else _by_need(numbers, RowLayout(sizes, shared))
    about = {
        "wanted": asdict(wanted),
        "target_fingerprint": target.fingerprint,
        "num_tokens": target.num_tokens,
        "store": store.meta["about"],
        "records": order,
        "shared": {str(record): list(place) for record, place in shared.items()},
    }
    return RowLayout({record: sizes[record] for record in order}, shared), about


def _as_compared(record: Record, target: Target) -> Any:
    """Return the tokens of a record as uint32; those of an image are equal only for equal images."""
    tokens_T = np.asarray(record.tokens, dtype=np.uint32)
    if record.images:
        assert target.images is not None, "records with images are refused without it"
        digest = hashlib.sha256("".join(image.digest for image in record.images).encode()).digest()
        tokens_T[tokens_T == target.images.visual_id] = 1 << 31 | int.from_bytes(digest[:4]) >> 1
    return tokens_T


def _by_need(records: Sequence[int], layout: RowLayout) -> list[int]:
    """Return records so that what others share with them comes before those."""
    owners = [piece.owner for record in records for piece in layout.pieces(record)]
    return list(dict.fromkeys([*owners, *records]))


def _announce(layout: RowLayout, wanted: Wanted, target: Target, *, max_gb: float) -> None:
    tokens, row = sum(layout.sizes.values()), wanted.bytes_a_row(target)
    size = layout.num_rows * row / 1e9
    once = (
        f", {tokens - layout.num_rows:,} of them in beginnings that are stored once ({tokens * row / 1e9:.2f} GB without)"
        if layout.num_rows < tokens
        else ""
    )
    say(f"cache of the target's {wanted}: {len(layout.sizes):,} records, {tokens:,} tokens{once}, {size:.2f} GB")
    if size > max_gb:
        narrower = "" if wanted.dtype == "int8" else " bfloat16 or int8" if wanted.dtype == "float32" else " int8"
        choices = ["top_k or states", *([f"cache_dtype{narrower}"] if narrower else []), "fewer records"]
        raise DataError(
            f"data.cache needs {size:.2f} GB for the target's {wanted}, data.max_cache_gb allows {max_gb:g}. "
            f"Choose {', '.join(choices)}, or a higher limit."
        )


def _check_plan(folder: Path, about: dict[str, Any]) -> None:
    """Keep shards of the same plan; remove those of another."""
    path = folder / "plan.json"
    if path.exists() and not _same_plan(json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(about))):
        for stale in [*folder.glob("*.npy"), *folder.glob("shard-*.json"), folder / "cache.json"]:
            stale.unlink(missing_ok=True)
    write_json(path, about)


def _same_plan(one: dict[str, Any], other: dict[str, Any]) -> bool:
    # Earlier versions wrote another name for `distribution`: the wanted outputs are compared by value, in their order. They shared no
    # rows.
    wanted = [list(plan["wanted"].values()) for plan in (one, other)]
    rest = [{"shared": {}} | plan | {"wanted": None} for plan in (one, other)]
    return wanted[0] == wanted[1] and rest[0] == rest[1]


@torch.no_grad()
def rows_of_texts(
    texts: Sequence[Record],
    target: Target,
    wanted: Wanted,
    *,
    skipped: Sequence[int],
    read: Callable[[int], None],
) -> tuple[dict[str, Any], Cost]:
    """Return the arrays of some records, joined in their order, and what their type costs.

    Texts of similar lengths are read together, each in a row of its own: a plain causal mask is right, and little is padding.

    Args:
        skipped: First rows of each record that are left out.
        read: Called after every call of the target with the number of tokens that it read.
    """
    made: list[dict[str, Any]] = [{}] * len(texts)
    cost = Cost()
    needs = wanted.states | TargetNeeds(final=wanted.final or wanted.distribution is not None)
    tokens = TOKENS_STORED_ON_CPU if target.device.type == "cpu" else TOKENS_STORED
    for numbers in groups([len(text.tokens) for text in texts], tokens=tokens):
        group = [texts[i].tokens for i in numbers]
        spans = [(row, slice(skipped[i], len(texts[i].tokens))) for row, i in enumerate(numbers)]
        images = [PlacedImages(row, 0, texts[i].images) for row, i in enumerate(numbers) if texts[i].images]
        seen = target.read(*_side_by_side(group), needs, images=images)
        states, more = _states(seen, spans, target, wanted)
        cost += more
        for row, number in enumerate(numbers):
            distribution = {} if seen.final_BTD is None else _distribution(seen.final_BTD[spans[row]], target, wanted)
            made[number] = {name: rows[row] for name, rows in states.items()} | distribution
        read(sum(map(len, group)))
    return {name: np.concatenate([arrays[name] for arrays in made]) for name in wanted.arrays}, cost


def _side_by_side(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (tokens_BT, positions_BT), a text a row. Positions count on in the padding: it needs no mask."""
    width = max(map(len, texts))
    tokens_BT = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    return tokens_BT, torch.arange(width).expand_as(tokens_BT)


def _states(
    seen: TargetOutput, spans: Sequence[tuple[int, slice]], target: Target, wanted: Wanted
) -> tuple[dict[str, list[Any]], Cost]:
    """Return by name the stored states of each span, and what their type costs."""
    lengths = [span.stop - span.start for _, span in spans]
    found, cost = {}, Cost()
    for index, state_BTD in seen.hidden_BTD.items():
        joined_ND = torch.cat([state_BTD[span] for span in spans])
        found[f"hidden_{index}"] = split_rows(as_array(states_as(wanted.dtype, joined_ND)), lengths)
    if wanted.final:
        assert seen.final_BTD is not None
        joined_ND = torch.cat([seen.final_BTD[span] for span in spans])
        stored_NS = states_as(wanted.dtype, joined_ND, final_of=target)
        if wanted.distribution in (None, "states"):
            cost = Cost.measured(joined_ND, stored_NS, target)
        found["final"] = split_rows(as_array(stored_NS), lengths)
    return found, cost


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
