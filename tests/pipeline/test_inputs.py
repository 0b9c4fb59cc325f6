"""A run whose paths hold other content than before: refused by name, or what was made of it is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.config.load import load_recipe
from drafttrain.core import digests
from drafttrain.core.errors import RecipeError
from drafttrain.pipeline.folder import RunFolder

RECIPE = """
name: tiny
target: {model: target}
drafter: {kind: causal_lm, init: checkpoint, checkpoint: start}
loss: {kind: ce}
data:
  max_length: 40
  sources: [{kind: jsonl, path: data.jsonl}, {kind: text, path: texts}, {kind: generated}]
  generate: {prompts: {kind: jsonl, path: asked.jsonl}, num_records: 4}
train: {max_steps: 12, warmup_steps: 2, loggers: [csv]}
eval:
  prompts: test.jsonl
  validation_prompts: validation.jsonl
  beside: [{kind: rasd, retrieval: {kind: aded, corpus: corpus.txt}}]
"""
TRAINED_ON = {
    "data.sources.0": "data.jsonl",
    "data.sources.1": "texts/a.txt",
    "data.generate.prompts": "asked.jsonl",
    "target.model": "target/model.safetensors",
    "target.tokenizer": "target/chat_template.jinja",
    "target.model (generation config)": "target/generation_config.json",
    "drafter.checkpoint": "start/model.safetensors",
    "eval.validation_prompts": "validation.jsonl",
}


@pytest.fixture
def place(tmp_path: Path, save_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and all that it names."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("target", "start")):
        shutil.copytree(save_llama(num_layers=1, seed=number), tmp_path / name)
    (tmp_path / "target" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text")
    (tmp_path / "corpus.txt").write_text("what is counted")
    for name in ("data", "asked", "test", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"what stands in {name}"}) + "\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def edit(path: Path) -> None:
    """Change a file's content: its size and its time of change stay."""
    stat = path.stat()
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        first = sorted(tensors)[0]
        save_file(tensors | {first: tensors[first] + 1}, path, metadata={"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[::-1] if path.suffix == ".txt" else path.read_bytes().replace(b"a", b"o"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


def opened(place: Path, **wanted: Any) -> RunFolder:
    run = RunFolder(place / "runs" / "tiny")
    run.open(load_recipe(place / "r.yaml"), **wanted)
    return run


def begin(run: RunFolder) -> None:
    """Leave what a training leaves that was stopped."""
    (run.train / "checkpoints").mkdir()
    (run.train / "checkpoints" / "step-00000003.ckpt").touch()


@pytest.mark.parametrize("key", TRAINED_ON)
def test_a_resumed_training_refuses_content_that_changed(place: Path, key: str) -> None:
    begin(opened(place))
    opened(place)
    edit(place / TRAINED_ON[key])
    with pytest.raises(RecipeError) as refused:
        opened(place)
    (line,) = refused.value.problems
    assert line.startswith(f"{key}: {TRAINED_ON[key].split('/')[0]}")
    assert "has changed" in line
    # It is not forgotten by being refused once.
    with pytest.raises(RecipeError):
        opened(place)


def test_a_tokenizer_of_the_drafters_own_is_an_input_of_the_run(place: Path) -> None:
    shutil.copytree(place / "target", place / "own")
    recipe = RECIPE.replace("init: checkpoint, checkpoint: start", "init: scratch, tokenizer: own")
    (place / "r.yaml").write_text(recipe)
    begin(opened(place))
    edit(place / "own" / "chat_template.jinja")
    with pytest.raises(RecipeError, match=r"drafter\.tokenizer: own .*has changed"):
        opened(place)


def test_all_that_changed_is_named_at_once(place: Path) -> None:
    begin(opened(place))
    for name in TRAINED_ON.values():
        edit(place / name)
    with pytest.raises(RecipeError) as refused:
        opened(place)
    assert [line.partition(": ")[0] for line in refused.value.problems] == sorted(
        TRAINED_ON, key=list(json.loads((place / "runs" / "tiny" / "inputs.json").read_text())).index
    )


def test_the_same_content_at_another_time_is_the_same(place: Path) -> None:
    begin(opened(place))
    for path in place.rglob("*"):
        if path.is_file() and "runs" not in path.parts:
            os.utime(path)
    opened(place)


def test_fit_refuses_an_edited_file_of_a_stopped_and_of_a_finished_run(place: Path) -> None:
    run = opened(place)
    begin(run)
    edit(place / "data.jsonl")
    for _ in range(2):
        shown = CliRunner().invoke(app, ["fit", "r.yaml"])
        assert shown.exit_code == 2
        assert "data.sources.0: data.jsonl has changed" in shown.output
        run.train_done.write_text("{}")


def test_before_the_training_what_was_made_of_other_content_is_made_again(place: Path) -> None:
    run = opened(place)
    for made in (run.start, run.validation):
        made.mkdir(parents=True)
    edit(place / "start" / "model.safetensors")
    opened(place)
    assert not run.start.exists()
    assert not run.validation.exists()
    begin(run)
    opened(place)


def test_texts_that_the_target_wrote_keep_to_their_prompts_and_target(place: Path) -> None:
    run = opened(place)
    (run.data / "generated").mkdir(parents=True)
    (run.data / "generated" / "shard-00000.jsonl").write_text("{}")
    edit(place / "data.jsonl")
    opened(place)
    edit(place / "asked.jsonl")
    with pytest.raises(RecipeError, match=r"data\.generate\.prompts: asked\.jsonl has changed"):
        opened(place)


def test_other_test_prompts_or_another_corpus_are_evaluated_again(place: Path) -> None:
    run = opened(place)
    begin(run)
    run.train_done.write_text("{}")
    for name in ("test.jsonl", "validation.jsonl", "corpus.txt"):
        for path in (run.eval, run.report):
            path.write_text("{}")
        edit(place / name)
        opened(place)
        assert not run.eval.exists()
        assert not run.report.exists()


def test_an_evaluation_needs_only_what_it_reads(place: Path) -> None:
    run = opened(place)
    begin(run)
    run.train_done.write_text("{}")
    (place / "data.jsonl").unlink()
    edit(place / "asked.jsonl")
    opened(place, evaluates_only=True)
    edit(place / "target" / "model.safetensors")
    with pytest.raises(RecipeError, match=r"target\.model: target"):
        opened(place, evaluates_only=True)


def test_a_file_that_is_gone_is_not_forgotten(place: Path) -> None:
    run = opened(place)
    begin(run)
    text = (place / "data.jsonl").read_text()
    (place / "data.jsonl").unlink()
    opened(place)
    (place / "data.jsonl").write_text(text.replace("a", "o"))
    with pytest.raises(RecipeError, match=r"data\.jsonl has changed"):
        opened(place)


@pytest.mark.parametrize("tensor", ["first", "middle", "last"])
def test_large_weights_are_read_in_samples_of_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1 << 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.zeros(100_000) for name in ("first", "last", "middle")}
    save_file(tensors, path)
    before = digests.weights_digest(path)
    tensors[tensor] += 1
    save_file(tensors, path)
    assert digests.weights_digest(path) != before
    save_file({"first": torch.zeros(300_000)}, path)
    assert digests.weights_digest(path) != before
    path.write_bytes(b"\xff" * 1_200_000)
    assert digests.weights_digest(path) != before


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WHOLE_BYTES", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data.jsonl"
    path.write_text("a" * 100)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    before = digests.text_digest(path)
    path.write_text("b" * 100)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert digests.text_digest(path) == before, "by size and time it is the same file: it is not read"
    os.utime(path, (1_000_000_001, 1_000_000_001))
    assert digests.text_digest(path) != before
    # Changed just now: it may change again without another time.
    path.write_text("c" * 100)
    last = digests.text_digest(path)
    path.write_text("d" * 100)
    assert digests.text_digest(path) != last


JUDGE = """
name: tiny
target: {model: target}
head: {kind: judge, drafter: start}
data:
  max_length: 40
  sources: [{kind: jsonl, path: data.jsonl}]
  annotate: {kind: marked, path: marks.jsonl}
train: {max_steps: 12, warmup_steps: 2}
eval:
  prompts: test.jsonl
  validation_prompts: validation.jsonl
  checker: {kind: unit_tests, path: tests.jsonl, allow_code_execution: true}
"""


@pytest.fixture
def judged(place: Path) -> Path:
    """The same folder with a recipe that trains a head by marks."""
    (place / "r.yaml").write_text(JUDGE)
    for name in ("marks", "tests"):
        (place / f"{name}.jsonl").write_text('{"id": "a"}\n')
    return place


def test_edited_marks_are_refused_or_read_again(judged: Path) -> None:
    run = opened(judged)
    (run.data / "labelled").mkdir(parents=True)
    edit(judged / "marks.jsonl")
    opened(judged)
    assert not (run.data / "labelled").exists()
    begin(run)
    (judged / "marks.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match=r"data\.annotate \(marked\): marks\.jsonl has changed"):
        opened(judged)


def test_edited_unit_tests_are_run_again(judged: Path) -> None:
    run = opened(judged)
    begin(run)
    run.eval.write_text("{}")
    edit(judged / "tests.jsonl")
    opened(judged, evaluates_only=True)
    assert not run.eval.exists()


def test_an_edited_file_of_deepspeed_is_refused(place: Path) -> None:
    (place / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (place / "r.yaml").write_text(RECIPE.replace("loggers: [csv]", "loggers: [csv], deepspeed: {config: ds.json}"))
    begin(opened(place))
    (place / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(RecipeError, match=r"train\.deepspeed\.config: ds\.json has changed"):
        opened(place)
