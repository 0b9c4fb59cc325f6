"""Labelled draft tokens on disk, and the order in which a head is trained on them.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json, written_beside
from drafttrain.core.random import stream_seed
from drafttrain.core.registry import component_mapping
from drafttrain.core.texts import Record
from drafttrain.data_gen.annotate import Annotator, Frozen, annotators
from drafttrain.data_gen.groups import groups
from drafttrain.data_gen.names import Names, shared_names
from drafttrain.data_gen.sampler import Sampler, own_shares
from drafttrain.data_gen.training_data import TrainingData
from drafttrain.heads import TokenHead
from drafttrain.heads.rows import HeadBatch, HeadRows
from drafttrain.target_model.weights_digest import weights_digest

RECORDS_A_SHARD = 32
ARRAYS = ("features", "labels", "held_out")


class LabelledTokens:
    """All rows of a run, split by text into rows to train on and held-out rows."""

    def __init__(self, folder: Path) -> None:
        self.about: dict[str, Any] = json.loads((folder / "labelled.json").read_text(encoding="utf-8"))
        shards = [[np.load(path, allow_pickle=False) for path in paths(folder, n)] for n in range(self.about["shards"])]
        features, labels, held_out = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*shards, strict=True))
        self.train = HeadRows(features[~held_out], labels[~held_out])
        self.held_out = HeadRows(features[held_out], labels[held_out])
        if not len(self.train) or not len(self.held_out):
            raise DataError(
                f"{folder}: {len(self.train)} labelled tokens to train on and {len(self.held_out)} held out: add more texts"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return int(self.train.features_ND.shape[1])


class RowOrder:
    """The rows of an optimizer step: a pure function of (seed, step)."""

    def __init__(self, rows: HeadRows, head: TokenHead, *, seed: int) -> None:
        self.rows = rows
        self.weights_N = head.weights(rows.labels_N).double()
        self._sampler = Sampler([len(rows)], [1.0], seed=seed)

    def of_step(
        self,
        step: int,
        *,
        batch_size: int,
        records_per_device: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[HeadBatch]:
        """Return the micro-batches of one optimizer step on one rank; some may have no row."""
        chosen = torch.tensor([self._sampler.at(step * batch_size + i)[1] for i in range(batch_size)])
        weight = float(self.weights_N[chosen].sum())
        shares = own_shares([1] * batch_size, records_per_device=records_per_device, rank=rank, world_size=world_size)
        parts = [chosen[share] for share in shares]
        return [
            HeadBatch(HeadRows(self.rows.features_ND[part], self.rows.labels_N[part]), weight, step) for part in parts
        ]


def _labelled(texts: Sequence[Record], annotator: Annotator) -> list[HeadRows]:
    """Return the rows of each text; an annotator reads the texts of a group together."""
    found: dict[int, HeadRows] = {}
    for group in groups([len(text.tokens) for text in texts]):
        found |= dict(zip(group, annotator.label([texts[i] for i in group]), strict=True))
    return [found[number] for number in range(len(texts))]


def paths(folder: Path, shard: int) -> list[Path]:
    """Return the files of a shard."""
    return [folder / f"{name}-{shard:05d}.npy" for name in ARRAYS]


def annotate(settings: Any, data: TrainingData, frozen: Frozen, folder: Path) -> LabelledTokens:
    """Label the draft tokens of all texts, shard by shard; shards of an earlier run are kept.

    Raises:
        DataError: The rows would take more than `data.max_cache_gb`.
    """
    about = {
        "annotator": component_mapping(settings),
        "target_fingerprint": frozen.target.fingerprint,
        "drafter_digest": weights_digest(frozen.drafter),
        "seed": frozen.seed,
        "stores": [store.meta["about"] for store in data.stores],
    }
    plan, done = folder / "plan.json", folder / "labelled.json"
    if plan.exists() and json.loads(plan.read_text(encoding="utf-8")) != json.loads(json.dumps(about)):
        raise DataError(
            f"{folder}: holds labels of another annotator, target, drafter, seed or text, or of an older version of drafttrain: "
            "remove this folder to label the tokens again, or give the run another name (name=...)"
        )
    if not done.exists():
        write_json(plan, about)
        annotator: Annotator = annotators.build(settings, frozen)
        names = Names()
        records = [(store, index, names.own(id)) for store in data.stores for index, id in enumerate(store.ids)]
        if names.num_shared:
            say(f"data.sources: {shared_names(names.num_shared)}")
        shards = [records[start : start + RECORDS_A_SHARD] for start in range(0, len(records), RECORDS_A_SHARD)]
        rows = _Rows(limit_gb=data.settings.max_cache_gb)
        with progress("labelling", total=len(records), unit="texts") as bar:
            for number, shard in enumerate(shards):
                if not all(path.exists() for path in paths(folder, number)):
                    texts = [replace(store[index], id=name) for store, index, name in shard]
                    arrays = _arrays(texts, _labelled(texts, annotator), held_out=settings.held_out, seed=frozen.seed)
                    _write(paths(folder, number), arrays)
                rows.add(paths(folder, number), of_shards=len(shards))
                bar.advance(len(shard))
        assert weights_digest(frozen.drafter) == about["drafter_digest"], "labelling changed the drafter"
        write_json(done, about | {"shards": len(shards)})
    labelled = LabelledTokens(folder)
    _check_shares(labelled.train.labels_N, least=settings.min_share)
    say(
        f"labelled tokens: {len(labelled.train):,} to train on, mean label {float(labelled.train.labels_N.mean()):.3f}; "
        f"{len(labelled.held_out):,} held out"
    )
    return labelled


def _check_shares(labels_N: torch.Tensor, *, least: float) -> None:
    share = float(labels_N.mean())
    if min(share, 1 - share) < least:
        raise DataError(
            f"{share:.1%} of the draft tokens are good enough to accept and {1 - share:.1%} are not; data.annotate.min_share requires "
            f"{least:.0%} of both: use another drafter, or other texts"
        )


class _Rows:
    """Checks the size of written shards against the limit."""

    def __init__(self, *, limit_gb: float) -> None:
        self.limit_gb = limit_gb
        self.bytes = 0
        self.shards = 0

    def add(self, written: Sequence[Path], *, of_shards: int) -> None:
        self.bytes += sum(path.stat().st_size for path in written)
        self.shards += 1
        expected = self.bytes / self.shards * of_shards / 1e9
        if self.shards == 1 and expected >= 0.1:
            say(f"labelled tokens will take about {expected:.1f} GB")
        if expected > self.limit_gb:
            raise DataError(
                f"the labelled tokens would take about {expected:.2f} GB, data.max_cache_gb allows {self.limit_gb:g}: "
                "label fewer texts, or raise the limit"
            )


def _arrays(
    records: Sequence[Record], rows: Sequence[HeadRows], *, held_out: float, seed: int
) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the arrays of a shard; a text is held out as a whole, by its name."""
    sides = [
        torch.full((len(part),), stream_seed(seed, "held out", record.id) % 10_000 < 10_000 * held_out)
        for record, part in zip(records, rows, strict=True)
    ]
    return (
        torch.cat([part.features_ND for part in rows]).numpy(),
        torch.cat([part.labels_N for part in rows]).numpy(),
        torch.cat(sides).numpy(),
    )


def _write(files: Iterable[Path], arrays: Iterable[np.ndarray[Any, Any]]) -> None:
    for path, array in zip(files, arrays, strict=True):
        with written_beside(path) as temporary, temporary.open("wb") as file:
            np.save(file, array)
