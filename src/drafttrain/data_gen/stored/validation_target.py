"""Cached target outputs on the validation prompts, so that drafters can be validated without running the target.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.eight_bit import as_states
from drafttrain.core.errors import DataError
from drafttrain.core.files import write_json
from drafttrain.core.images import PlacedImages
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.states import StatesSource
from drafttrain.data_gen.stored.cache_writer import build_cache
from drafttrain.data_gen.stored.target_cache import RowCache
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.distributed.collectives import first_before_others, shared
from drafttrain.distributed.world import is_first
from drafttrain.target_model import Target


def cached_continuations(
    path: Path,
    tasks: Sequence[Task],
    target: Target,
    source: StatesSource,
    *,
    max_new_tokens: int,
    seed: int,
    written: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the target's continuation of each prompt; for the same target and prompts it is generated once and stored in `path`."""
    about = {
        "target_fingerprint": target.fingerprint,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "tasks": [[task.id, list(map(int, task.prompt)), asdict(task.sampling)] for task in tasks],
    }
    stored = shared(_stored(path, about) if is_first() else None)[0]
    if stored is not None:
        return list(stored)
    # The first process's: those of engines are not reproducible.
    texts = shared(source.continued(tasks, target, max_new_tokens=max_new_tokens, seed=seed, written=written))[0]
    with first_before_others("it stores the validation texts"):
        if is_first():
            write_json(path, {"about": about, "texts": texts})
    return texts


def _stored(path: Path, about: Mapping[str, Any]) -> list[list[int]] | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored["texts"] if stored["about"] == json.loads(json.dumps(about)) else None


class CachedTarget(Target):
    """The target's stored outputs on the validation texts; its head turns stored final states into its distribution.

    Args:
        target: Its embedding, norm and head are used, its blocks never run.
        texts: Text number i has the rows of record i in the cache.
    """

    def __init__(self, target: Target, texts: Sequence[Sequence[int]], cache: RowCache) -> None:
        super().__init__(target.model, target.tokenizer, name=target.name, fingerprint=target.fingerprint)
        self._number = {tuple(text): number for number, text in enumerate(texts)}
        self._cache = cache

    def read(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        needs: TargetNeeds,
        *,
        documents: PackedDocuments | None = None,
        images: Sequence[PlacedImages] = (),
    ) -> TargetOutput:
        """Return the stored states of the documents in packed rows; 0 at padding.

        Raises:
            DataError: A document is not one of the texts, or a state is needed that was not stored.
        """
        assert not images, "a recipe with target.images is refused where the target is not replicated"
        wanted = self._cache.wanted
        if needs.logits or not set(needs.hidden) <= set(wanted.states.hidden):
            raise DataError(f"stored for the validation texts: the target's {wanted}; needed: {needs}")
        names = {index: f"hidden_{index}" for index in needs.hidden}
        width = int(self.model.get_output_embeddings().weight.shape[1])
        states = {
            name: torch.zeros(*tokens_BT.shape, width, dtype=self.model.dtype, device=self.device)
            for name in [*names.values(), *(["final"] if needs.final else [])]
        }
        for row, (tokens, positions) in enumerate(zip(tokens_BT.tolist(), positions_BT.tolist(), strict=True)):
            begins = [column for column, position in enumerate(positions) if position == 0]
            for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
                for name, rows in self._rows(tuple(tokens[begin:end]), states).items():
                    states[name][row, begin:end] = as_states(rows).to(states[name])
        hidden_BTD = {index: states[name] for index, name in names.items()}
        return TargetOutput(hidden_BTD=hidden_BTD, final_BTD=states.get("final"))

    def _rows(self, text: tuple[int, ...], names: Iterable[str]) -> dict[str, Tensor]:
        number = self._number.get(text)
        if number is not None:
            return self._cache.stored(number, len(text), names)
        if any(text):
            raise DataError(
                f"a text of {len(text)} tokens is not one of the {len(self._number)} stored validation texts"
            )
        return {}


class _Texts:
    """Texts in memory, read as numbered records."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts
        self.meta = {"about": {"texts": [list(map(int, text)) for text in texts]}}
        self.starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])

    def __getitem__(self, index: int) -> Record:
        text = self._texts[index]
        return Record(str(index), text, [True] * len(text))


def cached_target(
    folder: Path, texts: Sequence[Sequence[int]], target: Target, *, needs: TargetNeeds, dtype: Any, max_gb: float
) -> CachedTarget:
    """Return the target's stored outputs on these texts; store what the drafter needs and the final states first if they are missing."""
    wanted = Wanted(None, needs | TargetNeeds(final=True), 0, dtype)
    cache = build_cache(folder, _Texts(texts), range(len(texts)), target, wanted=wanted, max_gb=max_gb)
    return CachedTarget(target, texts, cache)
