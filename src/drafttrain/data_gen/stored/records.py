"""Encoded records on disk, read by number without loading the others.

A store is a folder of .npy files: tokens and masks of all records joined, and where each record begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.console import say
from drafttrain.core.files import folder_beside
from drafttrain.core.images import Image
from drafttrain.core.texts import LoggedDistribution, Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.names import Names, content_name, shared_names
from drafttrain.data_gen.quarantine import lost_of, read_items
from drafttrain.data_gen.sources import Item, RecordSource, Source
from drafttrain.data_gen.stored.images import ImageStore, write_images
from drafttrain.data_gen.stored.logged_distribution import DistributionStore, write_distributions

ENCODING = 2
"""Version of the encoding; a store of another version is encoded again."""


class Store:
    """The records of one source, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        self._mask = np.load(folder / "mask.npy", mmap_mode="r", allow_pickle=False)
        self._starts = np.load(folder / "starts.npy", allow_pickle=False)
        self.ids: list[str] = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
        """Names of the records; all differ."""
        labels = np.concatenate([[0], np.cumsum(self._mask, dtype=np.int64)])
        first = np.asarray(self._mask)[self._starts[:-1]].astype(np.int64)
        self.num_labels = labels[self._starts[1:]] - labels[self._starts[:-1]] - first
        """Trained positions by record; a first token has nothing before it and is not trained."""
        self.images = ImageStore.open(folder)
        """The images of the records; None: they have none."""
        self.distributions = DistributionStore.open(folder)
        """The target's distribution from serving logs; None: not logged."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        start, stop = self._starts[index], self._starts[index + 1]
        images = () if self.images is None else self.images[index]
        tokens, mask = self._tokens[start:stop].tolist(), self._mask[start:stop].tolist()
        return Record(self.ids[index], tokens, mask, images=images)

    def length(self, index: int) -> int:
        """Return the number of tokens of a record."""
        return int(self._starts[index + 1] - self._starts[index])

    @property
    def tokens(self) -> np.ndarray[Any, Any]:
        """The tokens of all records, joined."""
        return self._tokens

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """The trained tokens of all records, joined."""
        return np.asarray(self._tokens[self._mask])

    @property
    def starts(self) -> np.ndarray[Any, Any]:
        """Where each record begins in `tokens`, and the end."""
        return self._starts


def open_store(
    folder: Path, source: Source, encoder: Encoder, *, about: dict[str, Any], max_lost_share: float = 1.0
) -> Store:
    """Return the store of a source; encode it first unless a store of the same content exists.

    Args:
        about: What the content depends on (settings, tokenizer); when it changes, the source is encoded again.
        max_lost_share: Share of the items that may be quarantined.

    Raises:
        DataError: More items are quarantined, or none is left.
    """
    about = about | {"encoding": ENCODING}
    if (folder / "meta.json").exists():
        store = Store(folder)
        if store.meta["about"] == about:
            lost = lost_of(folder / "quarantine.jsonl")
            lost.check(store.meta.get("items", 0), name=_name(about), max_share=max_lost_share)
            return store
    with folder_beside(folder) as temporary:
        _encode(temporary, source, encoder, about=about, max_lost_share=max_lost_share)
    encoder.report(_name(about))
    return Store(folder)


def records_of(item: Item, source: Source, encoder: Encoder) -> list[Record]:
    """Return the records of an item.

    Raises:
        BadItem: It gives none.
    """
    if isinstance(source, RecordSource):
        found = list(source.records(item, encoder))
    else:
        found = encoder.records(item.value, id=content_name(item.value))
    encoder.refuse_lone_image_tokens(found)
    return found


def _name(about: dict[str, Any]) -> str:
    return f"source {about['source']['kind']}"


def _encode(folder: Path, source: Source, encoder: Encoder, *, about: dict[str, Any], max_lost_share: float) -> None:
    names, own_ids, sizes = Names(), list[str](), list[int]()
    tokens, masks = _Growing(np.uint32), _Growing(np.bool_)
    logged: list[LoggedDistribution | None] = []
    images: list[Sequence[Image]] = []
    settings, quarantine = about["source"], folder / "quarantine.jsonl"
    read_well = 0

    def read(item: Item) -> list[Record]:
        nonlocal read_well
        records = records_of(item, source, encoder)
        read_well += 1
        return records

    for record in read_items(
        source,
        read,
        quarantine,
        name=_name(about),
        max_items=settings.get("max_items"),
        max_lost_share=max_lost_share,
    ):
        own_ids.append(names.own(record.id))
        sizes.append(len(record.tokens))
        tokens.extend(record.tokens)
        masks.extend(record.loss_mask)
        logged.append(record.logged)
        images.append(record.images)
    np.save(folder / "tokens.npy", tokens.array())
    np.save(folder / "mask.npy", masks.array())
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    (folder / "ids.json").write_text(json.dumps(own_ids), encoding="utf-8")
    if names.num_shared:
        say(f"{_name(about)}: {shared_names(names.num_shared)}")
    reasons = lost_of(quarantine).kinds
    meta = {
        "about": about,
        "items": read_well + sum(reasons.values()),
        "records": len(own_ids),
        "shared_names": names.num_shared,
        "tokens": len(tokens.array()),
        "set_aside": sum(reasons.values()),
        "set_aside_by": dict(reasons.most_common(20)),
    }
    if any(images):
        write_images(folder, images)
    if statistics := write_distributions(folder, logged):
        meta["logged_distribution"] = statistics
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


class _Growing:
    """An array that is extended piece by piece."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._pieces: list[np.ndarray[Any, Any]] = []

    def extend(self, values: Sequence[Any] | Iterable[Any]) -> None:
        self._pieces.append(np.asarray(values, dtype=self._dtype))

    def array(self) -> np.ndarray[Any, Any]:
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, dtype=self._dtype)
