"""eval.json: read, it is the result that was written; docs/eval_json.md describes its fields and no others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from drafttrain.checkpoint import About, write_about
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.eval.acceptance.lenience import LenienceSettings
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.head_figures import head_figures
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.result import FORMAT, Input, Result, current_result, read_result
from drafttrain.eval.settings import EvalSettings
from drafttrain.heads.acceptance import AcceptanceHead, AcceptanceSettings
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import MadeFor
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS

PAGE = Path(__file__).parents[2] / "docs" / "eval_json.md"


def evaluated(folder: Path, **changes: Any) -> Result:
    """Evaluate a drafter and its copy."""
    target = Target(random_llama().double(), byte_tokenizer(), name="T", fingerprint="")
    folder.mkdir()
    Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer).save(folder)
    write_about(folder, About("medusa", "T", "", target.tokenizer_fingerprint, target.vocab_size, 0))
    settings = EvalSettings(max_new_tokens=8, temperatures=[0.0, 1.0], speed_prompts=1, replay_lengths=[1, 2])
    settings = replace(settings, also=[FixedLengthSettings(1)], **changes)
    return evaluate({"drafter": folder, "start": folder}, target, PROMPTS[:2], settings)


def head_of(folder: Path) -> Any:
    """Return the figures of an untrained head."""
    head = AcceptanceHead(AcceptanceSettings(), 4)
    rows = HeadRows(torch.randn(20, 4), torch.rand(20))
    folder.mkdir()
    head.save(folder, MadeFor("T", "1", "D", "2"))
    return head_figures(folder, folder, rows, kind="acceptance")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A result with every field that does not need a checker or a lossy rule."""
    folder = tmp_path_factory.mktemp("result")
    inputs = {"target.model": Input("T", "12ab"), "eval.prompts": Input("p.jsonl", [["p.jsonl", "34cd"]])}
    result = evaluated(folder / "drafter")
    return replace(result, prompts_dropped_for_overlap=1, head=head_of(folder / "head"), inputs=inputs)


def test_a_result_that_is_read_and_written_again_is_the_same_file(whole, tmp_path):
    lossy = evaluated(tmp_path / "drafter", rule=LenienceSettings())
    for result in (whole, lossy):
        result.write(tmp_path / "eval.json")
        read_result(tmp_path / "eval.json").write(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == (tmp_path / "eval.json").read_bytes()
    assert lossy.lossy
    assert not whole.lossy


def test_a_number_that_was_not_measured_is_null_in_the_file_and_nan_when_read(whole, tmp_path):
    part = whole.temperatures[0]
    figures = replace(part.drafters["drafter"], draft_acceptance_rate=float("nan"))
    replace(whole, temperatures=[replace(part, drafters={"drafter": figures})]).write(tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())["temperatures"][0]["drafters"]["drafter"]
    assert found["draft_acceptance_rate"] is None
    read = read_result(tmp_path / "eval.json").temperatures[0].drafters["drafter"]
    assert math.isnan(read.draft_acceptance_rate)


def test_what_was_not_evaluated_is_left_out(whole):
    content = replace(whole, head=None, inputs=None).json()
    assert not {"head", "inputs"} & content.keys()
    assert not {"task", "agreement"} & content["temperatures"][0]["drafters"]["drafter"].keys()
    assert content["drafters"]["drafter"]["deepest"] == 2


def test_a_result_of_another_format_is_evaluated_again(whole, tmp_path):
    path = tmp_path / "eval.json"
    assert current_result(path) is None
    path.write_text(json.dumps({"format": FORMAT - 1}))
    assert current_result(path) is None
    whole.write(path)
    assert current_result(path).format == FORMAT


def test_an_evaluation_of_an_earlier_version_had_one_length_and_no_number_of_prompts(whole, tmp_path):
    content = whole.json()
    for part in content["temperatures"]:
        for figures in part["drafters"].values():
            del figures["length"], figures["exactness"], figures["alpha"]["num_prompts"]
    (tmp_path / "eval.json").write_text(json.dumps(content))
    found = read_result(tmp_path / "eval.json").temperatures[0].drafters["drafter"]
    assert (found.length, found.exactness) == (whole.settings["length"], "distribution")
    assert found.alpha.num_prompts is None


def test_an_evaluation_that_did_not_compare_the_baselines_texts_is_read(whole, tmp_path):
    content = whole.json() | {"format": 2}
    for part in content["temperatures"]:
        for name in ("transformers_generate_equal", "transformers_generate_comparable"):
            part["plain"].get("same_prompts", {}).pop(name, None)
    (tmp_path / "eval.json").write_text(json.dumps(content))
    found = read_result(tmp_path / "eval.json")
    assert [part.plain.same_prompts for part in found.temperatures] == [None, None]
    assert found.temperatures[0].drafters["drafter"].block_efficiency.value > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("target"), "target is missing"),
        (lambda content: content["target"].pop("name"), r"target\.name is missing"),
        (lambda content: content.update(num_prompts="two"), "num_prompts must be a int, got 'two'"),
        (lambda content: content.update(temperatures=5), "'int' object is not iterable"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused_with_the_field(whole, tmp_path, change, message):
    content = json.loads(json.dumps(whole.json()))
    change(content)
    (tmp_path / "eval.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_result(tmp_path / "eval.json")


def classes(kind: Any) -> Iterator[Any]:
    """Yield a dataclass and those inside it."""
    if is_dataclass(kind):
        yield kind
        for hint in get_type_hints(kind).values():
            yield from classes(hint)
    for argument in get_args(kind):
        yield from classes(argument)


def rows_of_the_page() -> dict[str, dict[str, str]]:
    """Return the meaning of every key of every class."""
    sections = re.split(r"^## .*\(`(\w+)`\)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    rows = [dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)) for text in sections[1::2]]
    return dict(zip(sections[::2], rows, strict=True))


def test_the_page_names_every_field_of_every_class_and_no_other():
    found = {name: list(rows) for name, rows in rows_of_the_page().items()}
    assert found == {kind.__name__: [field.name for field in fields(kind)] for kind in classes(Result)}


def test_the_page_marks_what_may_be_left_out():
    rows = rows_of_the_page()
    for kind in classes(Result):
        for field in fields(kind):
            optional = field.default is None and field.name != "num_prompts"
            assert rows[kind.__name__][field.name].startswith("Optional. ") == optional, (kind, field.name)
