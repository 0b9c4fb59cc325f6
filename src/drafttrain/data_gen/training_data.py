"""From the data section to micro-batches: shards, stores, cache, order, packing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.batches import DraftBatch
from drafttrain.core.console import say
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import LoggedDistribution
from drafttrain.data_gen.chat_template import common_start
from drafttrain.data_gen.contamination import Key, contaminated, write_contamination
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.packing import as_padding, pack
from drafttrain.data_gen.sampler import Sampler
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.shares import own_shares
from drafttrain.data_gen.sources import Source, Versioned, content_of, sources
from drafttrain.data_gen.stored.logged_distribution import with_logged
from drafttrain.data_gen.stored.records import Store, open_store
from drafttrain.data_gen.stored.target_cache import RowCache, Wanted, build_cache, with_stored
from drafttrain.target_model import Target


class TrainingData:
    """The records of a run and the order in which training reads them."""

    def __init__(self, stores: Sequence[Store], settings: DataSettings, encoder: Encoder, *, seed: int) -> None:
        self.stores = list(stores)
        self.settings = settings
        self.encoder = encoder
        self.sampler = Sampler([len(store) for store in stores], [s.weight for s in settings.sources], seed=seed)
        self.caches: list[RowCache | None] = [None] * len(self.stores)

    def plain(self) -> TrainingData:
        """Return the data without what the target writes."""
        kept = [i for i, source in enumerate(self.settings.sources) if source.kind != "generated"]
        settings = replace(self.settings, sources=[self.settings.sources[i] for i in kept])
        return TrainingData([self.stores[i] for i in kept], settings, self.encoder, seed=self.sampler.seed)

    def of_step(
        self,
        step: int,
        *,
        batch_size: int,
        records_per_device: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        multiple: int = 1,
    ) -> list[DraftBatch]:
        """Return the micro-batches of one optimizer step on one rank: a pure function of its arguments.

        `weight_of_step` counts the trained positions of all micro-batches on all ranks. A micro-batch for which no record is
        left holds padding alone: every rank takes the same number of backward passes.

        Args:
            multiple: See `packing.pack`.
        """
        places = [self.sampler.at(step * batch_size + i) for i in range(batch_size)]
        weight = float(sum(int(self.stores[source].num_labels[record]) for source, record in places))
        lengths = [self.stores[source].length(record) for source, record in places]
        shares = own_shares(lengths, records_per_device=records_per_device, rank=rank, world_size=world_size)
        shortest = int(np.argmin(lengths))
        batches = []
        for share in shares:
            members = [(number, *places[number]) for number in share or [shortest]]
            batch = self._micro_batch(members, weight=weight, step=step, multiple=multiple)
            batches.append(batch if share else as_padding(batch))
        return batches

    def _micro_batch(
        self, members: list[tuple[int, int, int]], *, weight: float, step: int, multiple: int
    ) -> DraftBatch:
        records = [self.stores[source][record] for _, source, record in members]
        batch, at = pack(records, width=self.settings.max_length, multiple=multiple, weight_of_step=weight, step=step)
        number = np.array([n for n, _, _ in members] + [-1])
        batch.documents_BT[:] = batch.documents_BT.new_tensor(number[batch.documents_BT.numpy()])
        laws = [self._law(source, index) for _, source, index in members]
        if all(law is not None for law in laws):
            # One record without leaves the whole micro-batch to the target, which says more of the others, too.
            known = [law for law in laws if law is not None]
            batch = with_logged(batch, at, records, known, num_tokens=self.encoder.size)
        cached = []
        for record, (_, source, index) in zip(records, members, strict=True):
            cache = self.caches[source]
            if cache is None or not cache.has(index):
                return batch
            cached.append((cache, index, len(record.tokens)))
        return with_stored(batch, at, cached)

    def _law(self, source: int, record: int) -> LoggedDistribution | None:
        law = self.stores[source].law
        return None if law is None else law[record]

    def has_logged_distribution(self, *, num_records: int) -> bool:
        """Tell whether the law of all records that the first `num_records` positions read is in the logs."""
        laws = ((self.stores[i].law, records) for i, records in enumerate(self.visited(num_records=num_records)))
        return all(not records or (law is not None and all(map(law.has, records))) for law, records in laws)

    def visited(self, *, num_records: int) -> list[list[int]]:
        """Return by source the records that the first `num_records` positions read, in the order of their numbers."""
        found: list[set[int]] = [set() for _ in self.stores]
        for position in range(num_records):
            source, record = self.sampler.at(position)
            found[source].add(record)
        return [sorted(records) for records in found]

    def label_counts(self) -> np.ndarray[Any, Any]:
        """Return how often each token id is a label in a record as training draws them: sources by their weights."""
        sizes = [int(store.tokens.max()) + 1 for store in self.stores]
        counts_V = np.zeros(max(sizes))
        for store, source, size in zip(self.stores, self.settings.sources, sizes, strict=True):
            counts_V[:size] += source.weight / len(store) * np.bincount(store.labels, minlength=size)
        return counts_V

    def contaminated(self, prompts: Mapping[Key, Sequence[int]]) -> list[Key]:
        """Return the keys of prompts that share an n-gram with any record; what a chat template adds is no part of one."""
        before, after = self.encoder.frame()

        def own(tokens: Sequence[int]) -> Sequence[int]:
            rest = tokens[common_start(tokens, before) :]
            return rest[: len(rest) - common_start(rest[::-1], after[::-1])]

        texts = (
            store.tokens[store.starts[i] : store.starts[i + 1]] for store in self.stores for i in range(len(store))
        )
        prompts = {id: own(tokens) for id, tokens in prompts.items()}
        return contaminated(prompts, texts, ngram=self.settings.overlap_ngram)


def generate_texts(
    settings: DataSettings,
    target: Callable[[], Target],
    folder: Path,
    *,
    seed: int,
) -> None:
    """Write what the target is to write, where it is not written yet."""
    if settings.generate is not None:
        generate(
            settings.generate,
            target(),
            folder / "generated",
            seed=seed,
            max_length=settings.max_length,
        )


def prepare(
    settings: DataSettings,
    folder: Path,
    *,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    seed: int,
) -> TrainingData:
    """Encode every source, or take up what an earlier run encoded."""
    encoder = Encoder(tokenizer, settings.max_length)
    stores = []
    for number, chosen in enumerate(settings.sources):
        content = content_of(chosen)
        content.pop("weight")
        about = {"source": content, "max_length": settings.max_length, "tokenizer": tokenizer_fingerprint}
        if chosen.kind == "generated" and chosen.path is None:
            chosen = replace(chosen, path=str(folder / "generated"))
        source: Source = sources.build(chosen)
        if isinstance(source, Versioned):
            about["version"] = source.version()
        store = open_store(
            folder / f"{number}-{chosen.kind}",
            source,
            encoder.reading_as(chosen),
            about=json.loads(json.dumps(about)),
            max_lost_share=chosen.max_lost_share,
        )
        say(f"source {chosen.kind}: {len(store):,} records, {len(store.tokens):,} tokens, weight {chosen.weight:g}")
        if logged := store.meta.get("logged_distribution"):
            say(
                f"source {chosen.kind}: the log has the target's law of {logged['records']:,} records, up to {logged['named_tokens']} "
                f"tokens a row; the tail's mass is {logged['mean_tail_mass']:.4f} on average"
            )
        stores.append(store)
    return TrainingData(stores, settings, encoder, seed=seed)


def attach_cache(
    data: TrainingData, folder: Path, target: Target, *, num_records: int, law: bool = True, needs: TargetNeeds
) -> None:
    """Store what the target knows of the records that training will read, and let batches bring it.

    Args:
        law: The loss compares with the target's law.
        needs: What the drafter reads of the target; nothing else is stored.
    """
    settings = data.settings
    law = law and (settings.cache == "none" or not data.has_logged_distribution(num_records=num_records))
    if settings.cache == "none" or (not law and needs == TargetNeeds()):
        return
    wanted = Wanted(settings.cache if law else None, needs, settings.cache_top_k, settings.cache_dtype)
    for number, records in enumerate(data.visited(num_records=num_records)):
        if records:
            data.caches[number] = build_cache(
                folder / f"{number}-cache",
                data.stores[number],
                records,
                target,
                wanted=wanted,
                max_gb=settings.max_cache_gb,
            )


def note_contamination(data: TrainingData, prompts: Mapping[Key, Sequence[int]], path: Path) -> list[Key]:
    """Write the keys of contaminated prompts to a file and return them."""
    found = data.contaminated(prompts)
    if found:
        say(
            f"contamination: {len(found)} of {len(prompts)} evaluation prompts share {data.settings.overlap_ngram} tokens in "
            "a row with the training text and are not evaluated"
        )
    write_contamination(path, found, num_prompts=len(prompts), ngram=data.settings.overlap_ngram)
    return found
