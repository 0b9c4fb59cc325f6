"""The model card: commands for the engines, and the comparisons of engines and evaluator."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.eval.result import EvaluatedDrafter, Result
from drafttrain.serving.card import ORIGIN, SERVED, model_card, with_engines
from tests.eval import results


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


def test_the_card_shows_both_columns_and_replaces_the_earlier_comparison():
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


def result_of(kind: str, *, deepest: int | None) -> Result:
    """Return an evaluation with five draft tokens a round."""
    return results.result(about=EvaluatedDrafter("drafter", kind, 1, deepest, None, "the/target"))


@pytest.mark.parametrize(("deepest", "wanted"), [(3, 3), (None, 5), (8, 5)])
def test_a_command_in_the_card_drafts_no_more_than_there_are_heads(deepest, wanted):
    """vLLM refuses Medusa with more draft tokens than heads: their weights are in no file."""
    result = result_of("medusa", deepest=deepest)
    card = model_card("name", result, drafter="drafter", recipe="", command="")
    assert f'"num_speculative_tokens": {wanted}' in card


def test_the_card_of_a_format_names_its_placeholder(evaluated, tmp_path):
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
        assert "DRAFTER the folder that training exported" in card
