"""From the data section to micro-batches: shards, stores, cache, order, packing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.altered_text import packed_alterations
from drafttrain.core.batches import DraftBatch
from drafttrain.core.console import say
from drafttrain.core.images import Image
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import LoggedDistribution, Record
from drafttrain.data_gen.chat_template import common_start
from drafttrain.data_gen.contamination import Key, contaminated, write_contamination
from drafttrain.data_gen.curriculum import CurriculumSampler
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.packing import as_padding, pack, plan, row_length
from drafttrain.data_gen.sampler import Sampler, own_shares
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources import Source, Versioned, content_of, sources
from drafttrain.data_gen.stored.arriving import Arriving
from drafttrain.data_gen.stored.cache_writer import build_cache
from drafttrain.data_gen.stored.logged_distribution import with_logged
from drafttrain.data_gen.stored.noted_texts import NotedTexts
from drafttrain.data_gen.stored.records import Store, open_store
from drafttrain.data_gen.stored.target_cache import RowCache, with_stored
from drafttrain.data_gen.stored.target_sums import add_sums, sums_of_shards
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.drafters.text_notes import TextNotes
from drafttrain.target_model import Target
from drafttrain.target_model.image_reader import ImageReader

STEPS_LOOKED_AT = 32
"""Steps whose padding is counted before training; some milliseconds."""


class TrainingData:
    """The records of a run and the order in which training reads them.

    Args:
        num_records: Records of the whole training, for `data.curriculum`; None: it is not known, and there is no curriculum.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        settings: DataSettings,
        encoder: Encoder,
        *,
        seed: int,
        num_records: int | None = None,
    ) -> None:
        self.stores = list(stores)
        self.settings = settings
        self.encoder = encoder
        self.sampler = Sampler([len(store) for store in stores], [s.weight for s in settings.sources], seed=seed)
        if settings.curriculum is not None and num_records is not None:
            self.sampler = CurriculumSampler(
                self.sampler.sizes,
                [s.weight for s in settings.sources],
                seed=seed,
                with_images=[store.images is not None for store in stores],
                settings=settings.curriculum,
                num_records=num_records,
            )
        self.caches: list[RowCache | None] = [None] * len(self.stores)
        self.noted: list[NotedTexts] = []
        """By source, what the target noted about its texts; empty: the drafter reads no notes."""

    def plain(self) -> TrainingData:
        """Return the data without the sources that the target generates."""
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
        drawn: Mapping[int, Record] | None = None,
    ) -> list[DraftBatch]:
        """Return the micro-batches of one optimizer step on one rank: a pure function of its arguments.

        `weight_of_step` counts the trained positions of all micro-batches on all ranks. A micro-batch without records holds
        padding only, so that every rank runs the same number of backward passes.

        Args:
            multiple: See `packing.pack`.
            drawn: Records that replace those of the data, by their number within the step.
        """
        places = [self.sampler.at(step * batch_size + i) for i in range(batch_size)]
        drawn = drawn or {}
        weight = float(
            sum(
                sum(drawn[number].loss_mask) if number in drawn else int(self.stores[source].num_labels[record])
                for number, (source, record) in enumerate(places)
            )
        )
        lengths = [
            len(drawn[number].tokens) if number in drawn else self.stores[source].length(record)
            for number, (source, record) in enumerate(places)
        ]
        shares = own_shares(lengths, records_per_device=records_per_device, rank=rank, world_size=world_size)
        shortest = int(np.argmin(lengths))
        batches = []
        for share in shares:
            members = [(number, *places[number]) for number in share or [shortest]]
            batch = self._micro_batch(members, drawn, weight=weight, step=step, multiple=multiple)
            batches.append(batch if share else as_padding(batch))
        return batches

    def filled(
        self, *, batch_size: int, records_per_device: int | None, world_size: int, multiple: int
    ) -> tuple[float, float]:
        """Return the share of the rows' places that hold tokens: as records are packed, and with one record a row.

        Of the first `STEPS_LOOKED_AT` steps, on the first process.
        """
        width, tokens, packed, single = self.settings.max_length, 0, 0, 0
        for step in range(STEPS_LOOKED_AT):
            places = [self.sampler.at(step * batch_size + i) for i in range(batch_size)]
            lengths = [self.stores[source].length(record) for source, record in places]
            for share in own_shares(lengths, records_per_device=records_per_device, world_size=world_size):
                own = [lengths[number] for number in share]
                if own:
                    rows, alone = plan(own, width=width), [[number] for number in range(len(own))]
                    tokens += sum(own)
                    packed += len(rows) * row_length(own, rows, width=width, multiple=multiple)
                    single += len(alone) * row_length(own, alone, width=width, multiple=multiple)
        return tokens / packed, tokens / single

    def _micro_batch(
        self,
        members: list[tuple[int, int, int]],
        drawn: Mapping[int, Record],
        *,
        weight: float,
        step: int,
        multiple: int,
    ) -> DraftBatch:
        records = [drawn.get(number) or self.stores[source][record] for number, source, record in members]
        altered = [
            self.noted[source].altered(index, record, step=step, number=number)
            for record, (number, source, index) in zip(records, members, strict=True)
            if self.noted
        ]
        if altered:
            records = [replace(record, tokens=one.text) for record, one in zip(records, altered, strict=True)]
        batch, at = pack(records, width=self.settings.max_length, multiple=multiple, weight_of_step=weight, step=step)
        if altered:
            labels = [int(self.stores[source].num_labels[index]) for _, source, index in members]
            batch = replace(batch, altered=packed_alterations(batch.tokens_BT, at, altered, labels))
        number = np.array([n for n, _, _ in members] + [-1])
        batch.documents_BT[:] = batch.documents_BT.new_tensor(number[batch.documents_BT.numpy()])
        if any(record.drawn_by for record in records):
            # Nothing of the target is stored for a text that was not there before: the target runs.
            return batch
        logged = [self._logged(source, index) for _, source, index in members]
        known = [one for one in logged if one is not None]
        if len(known) == len(logged):
            # If one record lacks it, the target runs, and its full distribution is used for the others too.
            batch = with_logged(batch, at, records, known, num_tokens=self.encoder.size)
        cached = []
        for record, (_, source, index) in zip(records, members, strict=True):
            cache = self.caches[source]
            if cache is None or not cache.has(index):
                return batch
            cached.append((cache, index, len(record.tokens)))
        return with_stored(batch, at, cached)

    def _logged(self, source: int, record: int) -> LoggedDistribution | None:
        distributions = self.stores[source].distributions
        return None if distributions is None else distributions[record]

    def has_logged_distribution(self, *, num_records: int) -> bool:
        """Return whether the logs hold the target's distribution for all records that the first `num_records` positions read."""
        pairs = zip(self.stores, self.visited(num_records=num_records), strict=True)
        return all(
            not records or (store.distributions is not None and all(map(store.distributions.has, records)))
            for store, records in pairs
        )

    def visited(self, *, num_records: int) -> list[list[int]]:
        """Return, by source, the records that the first `num_records` positions read, in the order in which they are first read."""
        found: list[dict[int, None]] = [{} for _ in self.stores]
        for position in range(num_records):
            source, record = self.sampler.at(position)
            found[source][record] = None
        return [list(records) for records in found]

    def first_records(self, num_records: int) -> list[Record]:
        """Return the records of the first positions of the training order, each once, source by source."""
        places = zip(self.stores, self.visited(num_records=num_records), strict=True)
        return [store[number] for store, numbers in places for number in numbers]

    def label_counts(self) -> np.ndarray[Any, Any]:
        """Return how often each token id is a label, sources weighted as training draws from them."""
        sizes = [int(store.tokens.max()) + 1 for store in self.stores]
        counts_V = np.zeros(max(sizes))
        for store, source, size in zip(self.stores, self.settings.sources, sizes, strict=True):
            counts_V[:size] += source.weight / len(store) * np.bincount(store.labels, minlength=size)
        return counts_V

    def with_same_image(self, images: Mapping[Key, Sequence[Image]]) -> list[Key]:
        """Return the keys of prompts with an image of any record."""
        known = {digest for store in self.stores if store.images is not None for digest in store.images.digests()}
        return [key for key, own in images.items() if any(image.digest in known for image in own)]

    def contaminated(self, prompts: Mapping[Key, Sequence[Sequence[int]]]) -> list[Key]:
        """Return the keys of prompts that share an n-gram with any record, not counting what a chat template adds.

        Args:
            prompts: By key, the tokens of each question.
        """
        before, after = self.encoder.frame()

        def without_frame(tokens: Sequence[int]) -> Sequence[int]:
            rest = tokens[common_start(tokens, before) :]
            return rest[: len(rest) - common_start(rest[::-1], after[::-1])]

        texts = (
            store.tokens[store.starts[i] : store.starts[i + 1]] for store in self.stores for i in range(len(store))
        )
        questions = {
            (key, turn): without_frame(tokens) for key, asked in prompts.items() for turn, tokens in enumerate(asked)
        }
        found = {key for key, _ in contaminated(questions, texts, ngram=self.settings.overlap_ngram)}
        return [key for key in prompts if key in found]


def generate_texts(
    settings: DataSettings,
    target: Callable[[], Target],
    folder: Path,
    *,
    seed: int,
) -> None:
    """Let the target generate the texts of `data.generate` that are still missing."""
    if settings.generate is not None:
        generate(
            settings.generate,
            target(),
            folder / "generated",
            seed=seed,
            max_length=settings.max_length,
        )


def source_of(chosen: Any, folder: Path) -> Source:
    """Return the source of these settings; texts that the run generates itself are in its data folder."""
    if chosen.kind == "generated" and chosen.path is None:
        chosen = replace(chosen, path=str(folder / "generated"))
    source: Source = sources.build(chosen)
    return source


def prepare(
    settings: DataSettings,
    folder: Path,
    *,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    images: ImageReader | None = None,
    seed: int,
    num_records: int | None = None,
) -> TrainingData:
    """Encode every source, or load the stores of an earlier run.

    Args:
        num_records: See `TrainingData`.
        images: Reads images; None: records with images are quarantined.
    """
    encoder = Encoder(tokenizer, settings.max_length, images=images)
    stores = []
    for number, chosen in enumerate(settings.sources):
        content = content_of(chosen)
        content.pop("weight")
        about = {"source": content, "max_length": settings.max_length, "tokenizer": tokenizer_fingerprint}
        if images is not None:
            about["images"] = True
        source = source_of(chosen, folder)
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
                f"source {chosen.kind}: the log has the target's distribution for {logged['records']:,} records, up to "
                f"{logged['named_tokens']} tokens a row; the mean tail mass is {logged['mean_tail_mass']:.4f}"
            )
        stores.append(store)
    return TrainingData(stores, settings, encoder, seed=seed, num_records=num_records)


def attach_cache(
    data: TrainingData,
    folder: Path,
    target: Target,
    *,
    num_records: int,
    distribution: bool = True,
    own_vocabulary: bool = False,
    needs: TargetNeeds,
    arriving: Arriving | None = None,
) -> None:
    """Cache target outputs on the records that training will read, so that batches carry them.

    Args:
        distribution: The loss compares with the target's distribution.
        own_vocabulary: The drafter has a smaller vocabulary: sums over all tokens are stored, so that a step computes only its logits.
        needs: Target outputs that the drafter reads; no others are stored.
        arriving: Another process writes the cache; None: this one does, before it returns.
    """
    settings = data.settings
    if settings.cache == "none":
        return
    distribution = distribution and not data.has_logged_distribution(num_records=num_records)
    wanted = Wanted.of(settings, distribution=distribution, needs=needs)
    if wanted is None:
        return
    for number, records in enumerate(data.visited(num_records=num_records)):
        if records:
            place, store = folder / f"{number}-cache", data.stores[number]
            sums = sums_of_shards(store, wanted) if own_vocabulary and wanted.distribution == "states" else None
            cache = build_cache(
                *(place, store, records, target),
                wanted=wanted,
                max_gb=settings.max_cache_gb,
                more=sums,
                arriving=arriving,
            )
            if sums is not None and arriving is None:
                # A cache that was written for another drafter has none.
                add_sums(cache, store, target)
                cache = RowCache(place, target, wanted)
            data.caches[number] = cache


def attach_notes(
    data: TrainingData, folder: Path, target: Target, notes: TextNotes, *, num_records: int, seed: int
) -> None:
    """Let the target note what the drafter is trained on about the records that training will read."""
    for number, (store, records) in enumerate(zip(data.stores, data.visited(num_records=num_records), strict=True)):
        about = {
            "notes": notes.name,
            "settings": notes.about(),
            "target_fingerprint": target.fingerprint,
            "seed": seed,
            "store": store.meta["about"],
        }
        noted = NotedTexts(folder / f"{number}-{notes.name}", store, notes, about=about, seed=seed)
        if records:
            noted.write(records, target)
        data.noted.append(noted)


def note_contamination(
    data: TrainingData,
    prompts: Mapping[Key, Sequence[Sequence[int]]],
    path: Path,
    *,
    images: Mapping[Key, Sequence[Image]] | None = None,
) -> list[Key]:
    """Write the keys of contaminated prompts, given by the tokens of each question, to a file and return them.

    Args:
        images: Of prompts that have some: these are contaminated by their images, because many ask the same question.
    """
    images = images or {}
    found = data.contaminated({key: asked for key, asked in prompts.items() if key not in images})
    if found:
        say(
            f"contamination: {len(found)} of {len(prompts)} evaluation prompts share {data.settings.overlap_ngram} tokens in "
            "a row with the training text and are not evaluated"
        )
    if seen := data.with_same_image(images):
        say(f"contamination: {len(seen)} evaluation prompts have an image of the training data and are not evaluated")
    write_contamination(path, [*found, *seen], num_prompts=len(prompts), ngram=data.settings.overlap_ngram)
    return [*found, *seen]
