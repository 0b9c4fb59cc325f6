"""A live server's counters and the promise: a real server on loopback that decodes with our engine and counts as vLLM does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.checkpoint import About, read_drafter
from drafttrain.cli import app
from drafttrain.core.texts import Sampling
from drafttrain.eval.interval import Interval
from drafttrain.eval.prompts import read_prompts
from drafttrain.export.hf import export_hf
from drafttrain.serving.promise import Promise
from drafttrain.serving.reference import count_rounds, decode
from drafttrain.target_model import Target, TargetSettings
from tests.data_gen.backends.completions_server import serving
from tests.online.test_learning import near_copy
from tests.serving.live_server import DecodingServer

K = 3
TOKENS = 10
PROMPTS = 6


def made(target: Target, folder: Path, *, noise: float) -> Path:
    near_copy(target, noise=noise).save(folder / "weights")
    about = About("causal_lm", target.name, target.fingerprint, target.tokenizer_fingerprint, 257, 0)
    export_hf(folder / "weights", folder / "drafter", tokenizer=target.tokenizer, about=about, dtype="float32")
    return folder / "drafter"


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder)))


@pytest.fixture(scope="module")
def drafter(target, tmp_path_factory) -> Path:
    """A drafter folder with the evaluation that drafttrain eval made of it."""
    folder = tmp_path_factory.mktemp("live")
    lines = [{"id": f"p{i}", "tokens": [5 + i, 40 + 3 * i, 90 + i]} for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["eval", str(made(target, folder, noise=0.3)), f"eval.prompts={folder / 'prompts.jsonl'}"]
    words += [f"eval.max_new_tokens={TOKENS}", "eval.temperatures=[0]", "eval.speed_prompts=0"]
    done = CliRunner().invoke(app, [*words, f"eval.length.num_draft_tokens={K}", "eval.replay_lengths=[1,2]"])
    assert done.exit_code == 0, done.stderr
    return folder / "drafter"


def asked(server: DecodingServer, *words: object, code: int = 0) -> tuple[str, str]:
    """Run `drafttrain check-server` against a server; return its output."""
    with serving(server) as url:
        done = CliRunner().invoke(app, ["check-server", *map(str, words), url])
    assert done.exit_code == code, done.stderr
    return done.stdout, done.stderr


def server_of(target: Target, folder: Path, **changes: Any) -> DecodingServer:
    own = {"drafter": read_drafter(folder, target), "num_draft_tokens": K, "root": target.name}
    return DecodingServer(target, **own | changes)


def test_the_counters_of_a_server_are_compared_with_the_promise(target, drafter, tmp_path):
    # Counted only after the answer, as it may happen.
    server = server_of(target, drafter, late=2)
    stdout, stderr = asked(server, drafter, "--require", "--out", tmp_path)
    report = json.loads((tmp_path / "server.json").read_text())
    (row,) = report["temperatures"]
    # The same, decoded here without a server.
    prompts = read_prompts(str(drafter.parent / "prompts.jsonl"), target.tokenizer, prompt_tokens=None)
    result = json.loads((drafter / "eval.json").read_text())
    counted = {one["id"]: one["num_tokens"] for one in result["temperatures"][0]["drafters"]["drafter"]["prompts"]}
    ours = [
        count_rounds(one, max_new_tokens=counted[prompt.id])
        for prompt in prompts
        for one in decode(
            target,
            server.drafter,
            [prompt],
            Sampling(),
            max_new_tokens=counted[prompt.id],
            num_draft_tokens=K,
        )
    ]
    assert row["num_prompts"] == PROMPTS
    assert row["counters"] == {
        "num_drafts": sum(one.num_drafts for one in ours),
        "num_draft_tokens": sum(one.num_draft_tokens for one in ours),
        "num_accepted": sum(one.num_accepted for one in ours),
        "num_tokens": sum(counted.values()),
    }
    share = sum(one.accepted_at[1] for one in ours) / row["counters"]["num_drafts"]
    assert row["acceptance_by_position"][1] == pytest.approx(share)
    assert row["promise"]["value"] == result["temperatures"][0]["drafters"]["drafter"]["block_efficiency"]["value"]
    assert row["verdict"] == "kept", "the same prompts, the same text"
    assert ["accepted", f"{row['counters']['num_accepted']:,}"] in [line.split() for line in stdout.splitlines()]
    assert "the promise is kept: block efficiency" in stderr


def test_another_length_is_compared_with_the_replay_and_an_unknown_one_with_nothing(target, drafter, tmp_path):
    asked(server_of(target, drafter, num_draft_tokens=2), drafter, "--out", tmp_path)
    (row,) = json.loads((tmp_path / "server.json").read_text())["temperatures"]
    assert row["promise"]["measured"] == "replay"
    assert row["verdict"] == "kept"
    _, stderr = asked(server_of(target, drafter, num_draft_tokens=5), drafter, "--out", tmp_path, "--require", code=3)
    assert "there is no evaluation of chains of 5 draft tokens at this temperature" in stderr


def test_a_server_with_a_worse_drafter_does_not_keep_the_promise(target, drafter, tmp_path):
    worse = made(target, tmp_path, noise=3.0)
    words = [drafter, "--out", tmp_path]
    _, stderr = asked(server_of(target, worse), *words)
    assert "the promise is not kept" in stderr
    assert json.loads((tmp_path / "server.json").read_text())["temperatures"][0]["verdict"] == "below"
    _, stderr = asked(server_of(target, worse), *words, "--require", code=3)
    assert "temperature 0: the promise is not kept" in stderr


def test_prompts_that_overlap_with_other_clients_are_left_out(target, drafter, tmp_path):
    _, stderr = asked(server_of(target, drafter, others=[1, 2]), drafter, "--out", tmp_path)
    assert "2 more prompts are not counted: the server answered other requests meanwhile" in stderr
    (row,) = json.loads((tmp_path / "server.json").read_text())["temperatures"]
    assert (row["num_prompts"], row["num_prompts_shared"]) == (PROMPTS - 2, 2)
    # The rounds of the others, 7 each, are in none of these.
    assert row["counters"]["num_draft_tokens"] == K * row["counters"]["num_drafts"]
    assert not row["same_prompts"]
    _, stderr = asked(server_of(target, drafter, others=list(range(PROMPTS))), drafter, "--out", tmp_path, code=1)
    assert "also served other clients all the time" in stderr


def test_a_server_without_usable_counters_is_refused_in_one_line(target, drafter, save_llama, tmp_path):
    _, stderr = asked(server_of(target, drafter, drafter=None), drafter, code=1)
    assert "the server decodes without a drafter" in stderr
    other = str(save_llama(seed=5))
    _, stderr = asked(server_of(target, drafter, root=other), drafter, code=1)
    assert f"serves {other}, but the drafter was made for {target.name}" in stderr
    # Whoever vouches for a name is believed.
    elsewhere = server_of(target, drafter, root="/models/elsewhere")
    assert "is kept" in asked(elsewhere, drafter, "--model", "served", "--out", tmp_path)[1]
    _, stderr = asked(elsewhere, drafter, "--model", "other", code=1)
    assert "serves no model 'other'. Available: served" in stderr
    gone = CliRunner().invoke(app, ["check-server", str(drafter), "http://127.0.0.1:9"])
    assert gone.exit_code == 1
    assert "http://127.0.0.1:9/v1/models: no list of models" in gone.stderr


SILENT = "http://127.0.0.1:9"
"""An address without a server."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "sglang", SILENT], "its server has no counters of draft tokens. Engines with counters: vllm"),
        (["--engine", "vlm", SILENT], "Engines with counters: vllm"),
        ([SILENT], "give DRAFTER or --target"),
        (["nowhere", SILENT], "nowhere: no such folder"),
        (["http://me:secret@host"], "holds a name or a key"),
        (["me:secret@host"], "holds a name or a key"),
        (["host/?key=secret"], "holds a name or a key"),
        (["host:8000"], "must begin with http:// or https://"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(words, message):
    done = CliRunner().invoke(app, ["check-server", *words])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "secret" not in done.stderr


def test_a_promise_is_kept_within_its_interval_or_its_tolerance():
    wide, narrow = (Promise(Interval(2.0, low, high), None, "decoded") for low, high in ((1.5, 2.5), (1.999, 2.001)))
    assert [wide.verdict(x, x) for x in (1.49, 1.51, 2.49, 2.51)] == ["below", "kept", "kept", "above"]
    assert [narrow.verdict(x, x) for x in (1.95, 1.97, 2.03, 2.05)] == ["below", "kept", "kept", "above"]
    # A figure that is itself known up to an interval only.
    assert narrow.verdict(1.8, 1.97) == "kept"
