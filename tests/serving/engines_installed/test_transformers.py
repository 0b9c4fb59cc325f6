"""Hugging Face's assisted generation verifies an export of the command line, in its own process: make test-serving."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.target_model.folders import resolve_folder

pytestmark = pytest.mark.serving


def test_the_embedded_drafter_gives_the_same_tokens_and_counts(tmp_path):
    source = Path(shutil.copytree(resolve_folder("builtin:drafter"), tmp_path / "drafter"))
    words = ["export", str(source), "--target", "builtin:target", "--to", "hf", "--verify", "--speed"]
    words += [
        "export.verify=[transformers]",
        "export.verify_prompts=8",
        "export.verify_tokens=48",
        "export.speed_pairs=1",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "transformers (hf): passed" in done.stderr
    (comparison,) = json.loads((source / "engine.json").read_text())
    theirs, ours = (comparison["greedy"][side] for side in ("engine", "evaluator"))
    assert theirs == ours
    assert 0 < theirs["accepted_at"][1] < theirs["accepted_at"][0] < theirs["num_drafts"]
    assert comparison["sampled"]["text_p_value"] > 0.01
    speed = comparison["speed"]
    assert speed["texts"]["num_equal"] == speed["num_prompts"] == 8
    assert speed["engine"]["block_efficiency"] > 1
    for side in ("engine", "evaluator"):
        assert speed[side]["with_drafter"] / speed[side]["without_drafter"] == pytest.approx(
            speed[side]["speedup"]["value"]
        )
    assert "| greedy tokens/s with the drafter |" in (source / "README.md").read_text()
