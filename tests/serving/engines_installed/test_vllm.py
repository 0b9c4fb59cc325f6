"""vLLM loads exports and decodes like the embedded evaluator. Needs its environment: make test-serving."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.checkpoint import read_drafter
from drafttrain.cli import app
from drafttrain.environments.environment import EngineError, ask, check_installed
from drafttrain.export.convert import export_as, read_target_config
from drafttrain.serving.comparison import Comparison, compare_with_engine
from drafttrain.serving.engines import Job, ServingEngine, engine_of
from drafttrain.target_model.folders import resolve_folder
from tests.conftest import byte_tokenizer, random_llama
from tests.export import folders

pytestmark = pytest.mark.serving

TARGET = "builtin:target"
NUM_DRAFT_TOKENS = 3
EAGLE31 = "eagle3 fc_norm norm_output"
FOUR_TAPS = f"{EAGLE31} taps=0,2,3,5"


@pytest.fixture(scope="module")
def engine() -> ServingEngine:
    """The engine; if it is not installed, the tests fail."""
    vllm = engine_of("vllm")
    check_installed(vllm.environment)
    return vllm


@pytest.fixture(scope="module")
def served(engine, target, prompts, job, plain, learned):
    """A function that serves an exported folder and compares it with the folder that it was exported from."""

    def compared(kind: str, exported: Path, *, draft: str = "sampled") -> Comparison:
        drafter = read_drafter(learned(kind), target)
        drafter.draft = draft
        return compare_with_engine(
            engine,
            exported,
            drafter,
            target,
            prompts,
            job,
            num_draft_tokens=NUM_DRAFT_TOKENS,
            plain=plain,
        )

    return compared


@pytest.mark.parametrize(
    ("kind", "format", "draft"),
    [
        ("causal_lm", "vllm", "sampled"),
        ("medusa", "vllm", "greedy"),
        ("medusa draft_vocab_size=3072", "vllm", "greedy"),
        ("eagle", "vllm", "sampled"),
        ("eagle3", "vllm", "sampled"),
        ("eagle3", "speculators", "greedy"),
        ("eagle3 norm_before_fc", "vllm", "sampled"),
        ("dflash", "vllm", "greedy"),
        ("dflash causal", "vllm", "greedy"),
        ("dflash draft_vocab_size=3072", "vllm", "greedy"),
        ("dflash", "speculators", "greedy"),
        (EAGLE31, "vllm", "sampled"),
        (f"{EAGLE31} norm_before_residual", "speculators", "greedy"),
        ("eagle3 taps=1,4", "vllm", "greedy"),
        (FOUR_TAPS, "speculators", "greedy"),
        ("p_eagle", "vllm", "greedy"),
        ("p_eagle norm_before_residual", "speculators", "greedy"),
        ("p_eagle fc_norm taps=1,4", "vllm", "greedy"),
    ],
)
def test_each_kind_gives_the_same_tokens_and_the_same_counts(kind, format, draft, served, learned, tmp_path):
    export_as(
        format, learned(kind), tmp_path / "out", target_config=read_target_config(resolve_folder(TARGET), name=TARGET)
    )
    found = served(kind, tmp_path / "out", draft=draft)
    assert found.problems == ()
    assert found.draft == draft
    assert found.lossless.exact
    assert found.same_target.exact
    theirs, ours = found.greedy["engine"], found.greedy["evaluator"]
    assert theirs == ours
    # The comparison is meaningful only if drafts are accepted, rejected, and accepted beyond the first.
    assert 0 < theirs.accepted_at[1] < theirs.accepted_at[0] < theirs.num_drafts


def test_a_sampled_prompt_of_more_tokens_than_a_step_reads_is_read_whole(engine, tmp_path):
    """vLLM on a CPU fails where it splits the prompt of a text that has a seed."""
    model = random_llama(hidden_size=64, num_layers=1)
    model.config.max_position_embeddings = 8192
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prompt = [1 + place % 250 for place in range(4300)]
    job = Job(tmp_path, [prompt], 4, [1.0], "float32", 4400)
    ((found,),) = engine.decoded(ask(engine.environment, engine.worker, engine.request(job, None)))
    assert len(found.tokens) == 4


@pytest.mark.parametrize(
    "fault", [folders.drop_hidden_norm, folders.alter_rope_everywhere, folders.swap_columns, folders.shift_d2t]
)
def test_damage_that_vllm_silently_loads_shows_in_its_counters(fault, served, learned, tmp_path):
    """Behind the checks of names and values, which catch these too, the comparison is a second net."""
    exported = tmp_path / "out"
    export_as(
        "vllm", learned("eagle3"), exported, target_config=read_target_config(resolve_folder(TARGET), name=TARGET)
    )
    folders.damage(exported, fault)
    found = served("eagle3", exported)
    assert found.lossless.exact
    assert "drafts differently from the evaluator" in found.problems[0]


@pytest.mark.parametrize("fault", [folders.swap_feature_norms, folders.feed_back_before_norm])
def test_a_wrong_norm_of_eagle31_shows_in_vllms_counters(fault, served, learned, tmp_path):
    exported = tmp_path / "out"
    export_as("vllm", learned(EAGLE31), exported, target_config=read_target_config(resolve_folder(TARGET), name=TARGET))
    folders.damage(exported, fault)
    found = served(EAGLE31, exported)
    assert found.lossless.exact
    assert "drafts differently from the evaluator" in found.problems[0]


@pytest.mark.parametrize(("kind", "format"), [("eagle3 taps=1,4", "vllm"), (FOUR_TAPS, "speculators")])
def test_without_the_number_of_taps_vllm_does_not_load_other_than_three(kind, format, served, learned, tmp_path):
    """Why num_aux_hidden_states is written: vLLM makes its fc for three states."""
    exported = tmp_path / "out"
    export_as(format, learned(kind), exported, target_config=read_target_config(resolve_folder(TARGET), name=TARGET))
    folders.damage(exported, folders.drop_number_of_taps)
    with pytest.raises(EngineError):
        served(kind, exported, draft="greedy")


def test_a_bias_that_vllm_drops_changes_nothing_there(served, learned, tmp_path):
    """Why a bias is refused at the export: vLLM loads the folder and counts as if it had none."""
    exported = Path(shutil.copytree(learned("eagle"), tmp_path / "out"))
    folders.damage(exported, folders.add_fc_bias)
    assert served("eagle", exported).problems == ()


def test_the_command_line_exports_proves_and_writes_both_columns_into_the_card(engine, learned, tmp_path):
    source = Path(shutil.copytree(learned("medusa"), tmp_path / "drafter"))
    words = ["export", str(source), "export.verify_prompts=3", "export.verify_tokens=16", "--to", "vllm", "--verify"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "vllm (vllm): passed" in done.stderr
    for folder in (source, tmp_path / "drafter.vllm"):
        (comparison,) = json.loads((folder / "engine.json").read_text())
        assert comparison["verdict"] == "passed"
        assert comparison["greedy"]["engine"] == comparison["greedy"]["evaluator"]
        card = (folder / "README.md").read_text()
        assert f"| temperature 0: drafts | {comparison['greedy']['engine']['num_drafts']} | " in card
        assert card.count("## In serving engines") == 1
