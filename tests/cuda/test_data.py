"""Data on one GPU: every annotator that is registered, every form of the cache, what is stored of a target, generation."""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record, Sampling
from drafttrain.data_gen.annotate import Frozen, annotators
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.checkers import checkers
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.stored.cache_writer import build_cache
from drafttrain.data_gen.stored.target_cache import with_stored
from drafttrain.data_gen.stored.validation_target import _Texts, cached_target
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.target_model import Target
from tests.cuda.kinds import KINDS
from tests.cuda.models import new_drafter, texts

pytestmark = pytest.mark.pretended_cuda

CACHES = [form for form in typing.get_args(typing.get_type_hints(DataSettings)["cache"]) if form != "none"]
COMPLETION = "is 12, or 7"


@dataclass
class AnyTextSettings:
    """Every text has an answer."""


@checkers.register("any_text", AnyTextSettings)
class AnyText:
    """The answer is the text's length by three: what random models write has no numbers in it."""

    def __init__(self, settings: AnyTextSettings) -> None: ...

    def answer(self, text: str, *, id: str) -> int:
        """Return it."""
        return len(text) // 3

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        """Return whether it is the reference's."""
        return self.answer(text, id=id) == int(reference)


def marked_records(target: Target, path: Path) -> list[Record]:
    """Write an answer with a marked mistake; return its record."""
    line = {"id": "r0", "prompt": "this", "completion": COMPLETION, "errors": [[3, 5]]}
    path.write_text(json.dumps(line), encoding="utf-8")
    prompt, answer = (target.tokenizer(text, add_special_tokens=False).input_ids for text in ("this ", COMPLETION))
    return [Record("r0", [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))]


@pytest.mark.parametrize("kind", annotators.names())
def test_every_annotator(kind: str, target: Target, tmp_path: Path) -> None:
    drafter = new_drafter("causal_lm", target).eval().to(torch.bfloat16)
    records = texts((14, 11))
    entry = annotators.entry(kind)
    known: dict[str, Any] = {
        "checker": AnyTextSettings(),
        "max_new_tokens": 4,
        "max_mismatches": 2,
        "path": str(tmp_path / "marked.jsonl"),
    }
    names = {field.name for field in fields(entry.settings)}
    settings = entry.settings(**{name: value for name, value in known.items() if name in names})
    if "path" in names:
        records = marked_records(target, tmp_path / "marked.jsonl")
    rows = annotators.build(settings, Frozen(target, drafter, 0)).label(records)
    assert len(rows) == len(records)
    for one in rows:
        assert one.features_ND.device == one.labels_N.device == torch.device("cpu"), "labels are written to files"
    assert sum(map(len, rows)) > 0


@pytest.mark.parametrize("name", KINDS)
def test_acceptance_labels_of_every_kind_that_drafts_token_by_token(name: str, target: Target) -> None:
    entry = annotators.entry("acceptance")
    drafter = new_drafter(name, target).eval().to(torch.bfloat16)
    if drafter.deepest is not None:
        with pytest.raises(CheckpointError, match="several tokens from one state"):
            entry.component(entry.settings(), Frozen(target, drafter, 0)).label(texts((14,)))
        return
    (rows,) = entry.component(entry.settings(), Frozen(target, drafter, 0)).label(texts((14,)))
    assert len(rows) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("form", CACHES)
def test_every_cache_is_written_and_read_by_a_batch(form: Any, dtype: Any, target: Target, tmp_path: Path) -> None:
    drafter = new_drafter("eagle3", target)
    records = texts((14, 11))
    held = _Texts([record.tokens for record in records])
    wanted = Wanted(form, drafter.needs(), 8, dtype)
    cache = build_cache(tmp_path, held, range(2), target, wanted=wanted, max_gb=1)
    batch, places = pack(records, width=32, weight_of_step=1.0)
    batch = with_stored(batch, places, [(cache, number, len(one.tokens)) for number, one in enumerate(records)])
    batch = batch.to("cuda:0")
    assert batch.target_rows is not None
    logits_NV = batch.target_rows.at(torch.arange(5, device="cuda:0"))
    assert str(logits_NV.device) == "cuda:0"
    with torch.autocast("cuda", torch.bfloat16):
        assert drafter(batch.restored()).states_BTD[1].is_cuda


def test_a_stored_target_answers_on_the_device(target: Target, tmp_path: Path) -> None:
    records = texts((14, 11))
    needs = TargetNeeds(hidden=(1, 2))
    stored = cached_target(tmp_path, [one.tokens for one in records], target, needs=needs, dtype="bfloat16", max_gb=1)
    batch, _ = pack(records, width=32, weight_of_step=1.0)
    seen = stored.read(batch.tokens_BT, batch.positions_BT, needs | TargetNeeds(final=True))
    assert all(state.is_cuda for state in (*seen.hidden_BTD.values(), seen.final_BTD))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_builtin_backend_writes_texts(temperature: float, target: Target) -> None:
    tasks = [Task(one.id, one.tokens[: 3 + number], Sampling(temperature)) for number, one in enumerate(texts((9, 9)))]
    written = continuations(tasks, target, max_new_tokens=5, seed=0)
    assert all(1 <= len(text) <= 5 for text in written)
