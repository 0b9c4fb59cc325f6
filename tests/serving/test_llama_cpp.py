"""Requests to llama.cpp: a target that is converted once, tokens that end texts by their names, weights in the compared type."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.export.gguf_file import FILE, read_gguf
from drafttrain.serving.engines import Job, ServingEngine, Use, engine_of
from drafttrain.serving.engines.llama_cpp_worker import _difference, _in_type
from tests.export.test_gguf import MODELS, change_tensors, exported, merging_tokenizer, saved
from tests.serving.evaluations import evaluation

USE = Use("the/drafter.gguf", "causal_lm", 3, "sampled")


@pytest.fixture
def engine(monkeypatch, tmp_path) -> ServingEngine:
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    return engine_of("llama.cpp")


@pytest.fixture
def target(tmp_path) -> Path:
    return saved(MODELS["llama"](), tmp_path / "target", dtype=torch.bfloat16)


def test_a_target_is_written_once_for_its_weights_and_type(engine, target):
    first = engine.target_as(target, "float32")
    written = first.stat().st_mtime_ns
    assert engine.target_as(target, "float32") == first
    assert first.stat().st_mtime_ns == written
    metadata, tensors = read_gguf(first)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert metadata["general.file_type"] == 0
    own = engine.target_as(target)
    assert own != first
    assert read_gguf(own)[1]["blk.0.attn_q.weight"].dtype == torch.bfloat16
    change_tensors(lambda t: t["model.norm.weight"].mul_(2))(target)
    assert engine.target_as(target, "float32") != first


def test_texts_end_where_llama_cpp_ends_them(engine, tmp_path):
    """By the two ids in the configuration, and by token texts that it knows, whatever the configuration has."""
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens(["<|im_end|>", "<|not_an_end|>"], special_tokens=True)
    target = saved(MODELS["llama"](), tmp_path / "target", tokenizer)
    conventions = engine.conventions(target)
    assert conventions.end_tokens == {0, 1, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert not conventions.drafts_past_end


def test_sampled_drafts_are_asked_for_by_name(engine, target):
    job = Job(target, [[1, 2]], 8, [0.0, 1.0], "float32", 64)
    asked = engine.request(job, USE)
    assert (asked["drafter"], asked["draft"], asked["num_draft_tokens"]) == (
        f"the/drafter.gguf/{FILE}",
        "probabilistic",
        3,
    )
    assert engine.request(job, replace(USE, draft="greedy"))["draft"] == "greedy"
    alone = engine.request(job, None)
    assert (alone["drafter"], alone["target"]) == (None, asked["target"])


def test_the_worker_widens_weights_and_changes_nothing_else(target, tmp_path):
    file = exported(target, tmp_path / "out") / FILE
    wider = _in_type(str(file), "float32", str(tmp_path / "wider.gguf"))
    (before, narrow), (after, wide) = read_gguf(file), read_gguf(Path(wider))
    assert after == before
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(wide[name], narrow[name].float()) for name in narrow)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert _in_type(wider, "float32", "not written") == wider
    assert _in_type(str(file), "bfloat16", "not written") == str(file)


def test_counters_of_a_prompt_are_the_increase_of_the_servers():
    before = {"num_drafts": 3, "num_draft_tokens": 9, "num_accepted": 2, "accepted_at": []}
    after = {"num_drafts": 5, "num_draft_tokens": 14, "num_accepted": 4, "accepted_at": [3, 1, 0]}
    assert _difference(before, after) == {
        "num_drafts": 2,
        "num_draft_tokens": 5,
        "num_accepted": 2,
        "accepted_at": [3, 1, 0],
    }


def test_serve_config_needs_the_engines_format_and_finds_it_beside_the_drafter(engine, target, tmp_path):
    drafter = Path(shutil.copytree(target, tmp_path / "drafter"))
    evaluation({1: 1.5, 3: 2.5}, length=3, cost=0.1).write(drafter / "eval.json")
    words = ["serve-config", str(drafter), "--engine", "llama.cpp", "--target", "some/target"]
    early = CliRunner().invoke(app, words)
    assert early.exit_code == 1
    assert f"llama.cpp reads gguf: drafttrain export {drafter} --to gguf" in early.stderr
    out = exported(drafter, tmp_path / "drafter.gguf")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (
        f"llama-server -m some/target.gguf -md {out / FILE} --spec-type draft-simple --spec-draft-n-max 3 "
        "--spec-draft-sampling probabilistic --metrics\n"
    )


def test_a_local_target_is_named_by_its_converted_file(engine, target, tmp_path):
    drafter = Path(shutil.copytree(target, tmp_path / "drafter"))
    evaluation({1: 1.5, 3: 2.5}, length=3, cost=0.1).write(drafter / "eval.json")
    exported(drafter, tmp_path / "drafter.gguf")
    done = CliRunner().invoke(app, ["serve-config", str(drafter), "--engine", "llama.cpp", "--target", str(target)])
    assert f"llama-server -m {engine.target_as(target)} -md " in done.stdout


def test_other_kinds_are_refused_with_the_engines_that_run_them(engine):
    with pytest.raises(
        CheckpointError, match=r"llama\.cpp runs no drafter of kind eagle3, only causal_lm\. Engines for eagle3: .*vllm"
    ):
        engine.check_kind(Path("drafter"), "eagle3")
