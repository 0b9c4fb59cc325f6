"""drafttrain serve-config: the command that serves a drafter with its best draft length."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app


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


def test_vllm_is_told_that_p_eagle_drafts_in_parallel(evaluated):
    """No file can tell it, and without it vLLM would draft one token after the other with weights trained for one pass."""
    folder = evaluated("p_eagle")
    done = CliRunner().invoke(app, ["serve-config", str(folder), "--target", "the/target"])
    assert done.exit_code == 0, done.stderr
    quoted = done.stdout.strip().partition(" --speculative-config ")[2]
    wanted = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 3, "parallel_drafting": True}
    assert json.loads(quoted.strip("'")) == wanted


def served(folder: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["serve-config", str(folder), "--target", "the/target", *words])


def test_serve_config_takes_a_run_folder_for_its_drafter(evaluated, tmp_path):
    folder = evaluated("eagle3")
    of_run = served(tmp_path)
    assert of_run.exit_code == 0, of_run.stderr
    assert of_run.stdout == served(folder).stdout
    missing = served(tmp_path / "none")
    assert missing.exit_code == 2
    assert "none: no such folder" in missing.stderr
    (tmp_path / "none").mkdir()
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
    assert "rename the folder" in done.stderr
    assert not done.stdout


def test_serve_config_gives_vllm_no_folder_whose_taps_it_would_misread(evaluated):
    folder = evaluated("eagle3")
    exported = CliRunner().invoke(app, ["export", str(folder), "--to", "sglang"])
    assert exported.exit_code == 0, exported.stderr
    done = served(folder.with_name("drafter.sglang"))
    assert done.exit_code == 1
    assert "vllm reads vllm, hf, speculators" in done.stderr


def test_serve_config_refuses_a_kind_that_the_engine_has_no_method_for(evaluated):
    done = CliRunner().invoke(app, ["serve-config", str(evaluated("kangaroo"))])
    assert done.exit_code == 1
    assert "vllm runs no drafter of kind kangaroo, only causal_lm, medusa, eagle, eagle3" in done.stderr
