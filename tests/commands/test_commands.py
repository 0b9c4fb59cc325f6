"""A whole recipe on the path: gen, train, export, eval; resumed, gated, and without the trainer where it is not needed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from drafttrain.checkpoint import read_drafter
from drafttrain.cli import app
from drafttrain.cli.app import recipe_and_run_folder
from drafttrain.commands.evaluate import evaluate_recipe
from drafttrain.commands.export import export_run
from drafttrain.commands.fit import fit
from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DrafttrainError, GateError, RecipeError
from drafttrain.core.files import clear_leftovers
from drafttrain.pipeline import folder as run_folder
from drafttrain.pipeline.data import contaminated_prompts, training_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.target_model import Target
from drafttrain.training.metrics_log import COLUMNS, TIMES
from drafttrain.training.result import folder_of_step
from tests.evaluated_here import evaluate_here
from tests.training import waiting_loss

RECIPE = """
name: tiny
target: {{model: {target}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: tvdpp, scope: {scope}}}
data:
  max_length: 40
  sources: [{{kind: text, path: {text}}}]
train:
  {{max_steps: 12, batch_size: 4, records_per_device: 2, warmup_steps: 2, log_every_steps: 1, checkpoint_every_steps: 3, eval_every_steps: 6,
   eval_prompts: 2, loggers: [csv], optimizer: {optimizer}}}
eval: {{num_prompts: 2, max_new_tokens: 8, prompt_tokens: 6, speed_prompts: 1, prompts: {prompts},
       validation_prompts: {prompts}, overlap_ngram: 0}}
"""


def written_recipe(tmp_path: Path, tiny_folder: Path) -> Path:
    """Write the recipe and the texts that it reads."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    lines = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    text = RECIPE.replace(", overlap_ngram: 0", "").format(
        target=tiny_folder,
        text=tmp_path / "text.txt",
        prompts=tmp_path / "prompts.jsonl",
        scope="batch",
        optimizer="muon",
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path, tiny_folder) -> Path:
    return written_recipe(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> Path:
    """The folder of a finished run of the recipe; not to be changed."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        evaluate_here(patch)
        fit(load_recipe(written_recipe(place, tiny_folder)), place / "run")
    return place / "run"


def curve(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [tuple(v for k, v in row.items() if k not in TIMES) for row in csv.DictReader(file)]


TRAINS_ONLY = """
from drafttrain.cli import main
from drafttrain.commands import fit
fit.export_and_judge = lambda run: None
main()
"""
"""`drafttrain`, whose `fit` ends with the training."""


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", TRAINS_ONLY, *map(str, words)]


def test_fit_goes_all_the_way_and_a_second_time_does_nothing(recipe, tmp_path, capfd):
    tree = "eval.also=[{kind: tree, num_draft_tokens: 8, depth: 3, width: 2}]"
    loaded = load_recipe(recipe, [tree, "export.to=[vllm]"])
    fit(loaded, tmp_path / "run")
    folder = tmp_path / "run"
    for name in (
        "recipe.yaml",
        "provenance.json",
        "metrics.csv",
        "eval.json",
        "report.html",
        "drafter/README.md",
        "drafter.vllm/README.md",
    ):
        assert (folder / name).stat().st_size > 0, name
    result = json.loads((folder / "eval.json").read_text())
    assert result["trainer_loaded"] is False
    assert "NaN" not in (folder / "eval.json").read_text()
    greedy = result["temperatures"][0]["drafters"]["drafter"]
    assert greedy["parity"]["exact"]
    assert greedy["target_calls"] == greedy["vllm"]["num_drafts"]
    arms = ["drafter", "start", "drafter (tree 8, depth 3, width 2)", "start (tree 8, depth 3, width 2)"]
    for part in result["temperatures"]:
        assert list(part["drafters"]) == arms
        pairs = ["drafter - start", f"{arms[2]} - {arms[3]}", f"drafter - {arms[2]}"]
        assert list(part["comparisons"]) == pairs
    assert result["temperatures"][0]["drafters"][arms[2]]["parity"]["exact"]
    model = AutoModelForCausalLM.from_pretrained(folder / "drafter")
    assert sum(p.numel() for p in model.parameters()) == result["drafters"]["drafter"]["parameters"]
    before = (folder / "drafter" / "model.safetensors").stat().st_mtime
    capfd.readouterr()
    fit(loaded, folder)
    assert (folder / "drafter" / "model.safetensors").stat().st_mtime == before
    assert capfd.readouterr().err.count("done before, skipped") == 3
    with pytest.raises(RecipeError, match="another recipe"):
        fit(load_recipe(recipe, ["seed=1"]), folder)
    # A folder that an earlier version made, before a key existed, is continued.
    held = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(held.replace("  pretrain: null\n", ""))
    fit(loaded, folder)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 4
    assert 'src="http' not in page


@pytest.mark.usefixtures("evaluated_here")
def test_a_gate_that_is_not_met_rejects_the_drafter_and_says_by_how_much(recipe, tmp_path):
    loaded = load_recipe(recipe, ["export.require.block_efficiency=5.5", "drafter.draft=greedy", "export.to=[vllm]"])
    with pytest.raises(GateError, match=r"required 5\.5") as caught:
        fit(loaded, tmp_path / "run")
    assert caught.value.exit_code == 3
    for rejected in ("drafter.rejected", "drafter.rejected.vllm"):
        assert (tmp_path / "run" / rejected / "model.safetensors").exists()
    assert not list((tmp_path / "run").glob("drafter")) + list((tmp_path / "run").glob("drafter.vllm"))
    target = Target.load(loaded.target)
    assert read_drafter(tmp_path / "run" / "drafter.rejected", target).draft == "greedy"


@pytest.mark.usefixtures("evaluated_here")
def test_a_trained_run_is_judged_evaluated_and_exported_anew_without_being_trained_again(recipe, tmp_path):
    folder = tmp_path / "run"
    quick = ["eval.temperatures=[0]", "eval.speed_prompts=0", "train.eval_every_steps=0"]
    strict, lax = [*quick, "export.require.block_efficiency=5.5"], [*quick, "export.require.block_efficiency=0.5"]
    for stage, more in ((fit, []), (export_run, ["export.dtype=bfloat16"])):
        with pytest.raises(GateError):
            stage(load_recipe(recipe, [*strict, *more]), folder)
    trained, evaluated = ((folder / name).stat().st_mtime_ns for name in ("train.json", "eval.json"))
    fit(load_recipe(recipe, [*lax, "export.dtype=bfloat16", "name=other"]), folder)
    assert (folder / "eval.json").stat().st_mtime_ns == evaluated, "another floor needs no new figures"
    assert not (folder / "drafter.rejected").exists()
    assert {tensor.dtype for tensor in load_file(folder / "drafter" / "model.safetensors").values()} == {torch.bfloat16}

    lines = ["the quick brown fox jumps over", "nothing of this was read"]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    other = [f"eval.prompts={tmp_path / 'other.jsonl'}", "eval.prompt_tokens=20"]
    result = evaluate_recipe(load_recipe(recipe, [*quick, *other]), folder)
    assert (result.prompts_dropped_for_overlap, result.num_prompts) == (1, 1), "other prompts, the same text"
    assert (folder / "train.json").stat().st_mtime_ns == trained
    assert (folder / "eval.json").exists()
    page = (folder / "report.html").read_text()
    assert "<p>1 prompts" in page, "the report is that of these figures"
    assert "loss" in page, "with the training"
    DrafterRun(load_recipe(recipe, lax), folder)
    assert not (folder / "eval.json").exists(), "figures of other settings do not stand for this recipe's"
    with pytest.raises(RecipeError, match="another recipe"):
        evaluate_recipe(load_recipe(recipe, ["train.lr=1e-5"]), folder)


@pytest.mark.long
@pytest.mark.usefixtures("evaluated_here")
def test_another_step_that_was_kept_can_be_exported(recipe, tmp_path):
    quick = ["eval.temperatures=[0]", "eval.speed_prompts=0", "train.keep_best=2"]
    folder = tmp_path / "run"
    fit(load_recipe(recipe, quick), folder)
    best, second = (one["step"] for one in json.loads((folder / "best.json").read_text()))
    about = folder / "drafter" / "drafttrain.json"
    assert json.loads(about.read_text())["trained_steps"] == best
    export_run(load_recipe(recipe, [*quick, f"export.step={second}"]), folder)
    assert json.loads(about.read_text())["trained_steps"] == second
    exported, kept = (
        load_file(path / "model.safetensors") for path in (folder / "drafter", folder_of_step(folder, second))
    )
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    with pytest.raises(
        DrafttrainError, match=r"no weights of step 5 were kept, only of steps \d+, \d+ \(train.keep_best\)"
    ):
        export_run(load_recipe(recipe, [*quick, "export.step=5"]), folder)


def test_while_it_trains_a_run_keeps_to_its_evaluation(recipe, tmp_path):
    loaded = load_recipe(recipe)
    DrafterRun(loaded, tmp_path / "run")
    DrafterRun(load_recipe(recipe, ["name=other", "export.require.alpha=0.1", "train.loggers=[]"]), tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-1.ckpt").touch()
    for changed in ("eval.max_new_tokens=9", "export.dtype=bfloat16"):
        with pytest.raises(RecipeError, match="another recipe") as caught:
            DrafterRun(load_recipe(recipe, [changed]), tmp_path / "run")
        (problem,) = caught.value.problems
        assert problem.startswith(changed.partition("=")[0])


def test_until_a_run_trains_its_recipe_may_change_and_its_texts_stay(recipe, tmp_path, capfd, save_llama):
    folder = tmp_path / "run"
    asks = f"{{prompts: {{kind: text, path: {tmp_path / 'text.txt'}}}, prompt_tokens: 6, num_records: 4, max_new_tokens: 6}}"
    texts = [f"data.generate={asks}", "data.sources=[{kind: generated}]", "data.overlap_ngram=0"]
    gen(load_recipe(recipe, texts), folder)
    shards = {path.name: path.stat().st_mtime_ns for path in (folder / "data" / "generated").iterdir()}
    assert shards
    (folder / "start").mkdir()
    changed = load_recipe(recipe, [*texts, "train.lr=0.0123", "eval.max_new_tokens=9"])
    capfd.readouterr()
    gen(changed, folder)
    said = " ".join(capfd.readouterr().err.split())
    assert "nothing is trained here yet" in said
    assert "0.0123 here" in said
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "data" / "generated").iterdir()} == shards
    assert not (folder / "start").exists()
    assert load_recipe(str(folder)).train.lr == 0.0123
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1.ckpt").touch()
    with pytest.raises(RecipeError, match=r"kind: generated, path: .*: 2 problems") as caught:
        gen(load_recipe(recipe, [*texts, "train.lr=0.2", "seed=1", "eval.max_new_tokens=9"]), folder)
    assert list(caught.value.problems) == ["seed: 0 there, 1 here", "train.lr: 0.0123 there, 0.2 here"]

    reads = f"data.sources=[{{kind: generated, path: {folder / 'data' / 'generated'}}}]"
    gen(load_recipe(recipe, [reads, "name=other"]), tmp_path / "other")
    assert not (tmp_path / "other" / "data" / "generated").exists()
    assert json.loads((tmp_path / "other" / "data" / "0-generated" / "meta.json").read_text())["records"] == 4
    with pytest.raises(RecipeError, match=r"data.sources.0: .* was written by .*tiny_target.*, whose target has"):
        gen(load_recipe(recipe, [reads, f"target.model={save_llama(seed=7)}"]), tmp_path / "wrong")


def test_two_runs_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 0.3)
    folder = run_folder.RunFolder(tmp_path / "run")
    with (
        folder.locked(),
        pytest.raises(DrafttrainError, match=f"another run is using this folder.*process {os.getpid()} on"),
    ):
        folder.locked().__enter__()
    with folder.locked():
        pass


def test_what_a_killed_writer_left_is_removed_and_what_it_was_replacing_comes_back(tmp_path):
    for name in (
        ".best.old",
        "best.gone",
        ".best.ab.part",
        "data/.x.npy.cd.part",
        "checkpoints/step-3.part",
        ".last.old",
        "last",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if "best" in name or "last" in name:
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights").write_text(name)
        else:
            (tmp_path / name).write_text("half")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["weights"] * 3
    assert (tmp_path / "best" / "weights").read_text() == ".best.old"
    assert (tmp_path / "last" / "weights").read_text() == "last"


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_run_that_is_not_there_leaves_nothing_behind(command, recipe, tmp_path):
    result = CliRunner().invoke(app, [command, str(recipe), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 1
    assert "Run drafttrain fit first" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_with_another_name_is_another_run(recipe, tmp_path):
    DrafterRun(load_recipe(recipe), tmp_path / "tiny")
    at = {"smoke": False, "runs": tmp_path / "runs"}
    assert recipe_and_run_folder(str(tmp_path / "tiny"), [], **at)[1] == tmp_path / "tiny"
    assert recipe_and_run_folder(str(tmp_path / "tiny"), ["name=other"], **at)[1] == tmp_path / "runs" / "other"


@pytest.mark.long
@pytest.mark.parametrize("kill", [pytest.param(signal.SIGKILL, marks=pytest.mark.processes), signal.SIGTERM])
def test_a_killed_training_continues_bit_for_bit(recipe, tmp_path, kill, monkeypatch):
    """SIGKILL between two checkpoints, SIGTERM (exit code 75): the same command again gives the uninterrupted curve and weights.

    Rows are logged off the grid of checkpoints, so that sums of steps that are not logged yet must travel too.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*waiting_loss.PLUGIN, "train.max_steps=24", "train.eval_every_steps=12", "train.log_every_steps=7"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # Only the one that is killed needs a process of its own.
    monkeypatch.setattr("drafttrain.commands.fit.export_and_judge", lambda run: None)
    fit(load_recipe(recipe, words), whole / "tiny")
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command("fit", recipe, *words, "--runs", broken), env=environment | {"WAITS_IN": str(tmp_path)}, stderr=said
        )
    waiting_loss.wait_for(tmp_path, process)
    process.send_signal(kill)
    waiting_loss.release(tmp_path)
    assert process.wait() == (75 if kill is signal.SIGTERM else -signal.SIGKILL)
    assert (broken / "tiny" / "checkpoints" / f"step-{waiting_loss.STEP:08d}.ckpt").exists() is (kill is signal.SIGTERM)
    assert not (broken / "tiny" / "train.json").exists()
    fit(load_recipe(recipe, words), broken / "tiny")
    assert curve(broken / "tiny") == curve(whole / "tiny")
    best = json.loads((whole / "tiny" / "train.json").read_text())["drafter"]
    assert best.startswith("best/step-")
    for name in (best, "last"):
        ours, theirs = (load_file(folder / "tiny" / name / "model.safetensors") for folder in (broken, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.usefixtures("evaluated_here")
def test_a_run_whose_last_checkpoint_is_its_last_step_ends_as_it_would_have(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = (folder / "train.json").read_text()
    (folder / "train.json").unlink()
    fit(load_recipe(folder), folder)
    assert (folder / "train.json").read_text() == before


def test_a_test_prompt_in_the_training_text_is_dropped_whatever_the_other_prompts_are_called(recipe, tmp_path):
    """Prompts without ids are called by their lines, in both files."""
    spoiled = [{"text": "the quick brown fox jumps"}, {"text": "a prompt of its own, number one"}]
    clean = [{"text": "nothing of this was trained"}, {"text": "and nothing of that either"}]
    for name, lines in (("test", spoiled), ("validation", clean)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [f"eval.prompts={tmp_path / 'test.jsonl'}", f"eval.validation_prompts={tmp_path / 'validation.jsonl'}"]
    run = DrafterRun(load_recipe(recipe, [*files, "eval.prompt_tokens=20"]), tmp_path / "run")
    training_data(run)
    assert contaminated_prompts(run, str(tmp_path / "test.jsonl")) == ["1"]
    assert contaminated_prompts(run, str(tmp_path / "validation.jsonl")) == []


@pytest.mark.usefixtures("evaluated_here")
def test_pretraining_comes_first_reads_plain_text_only_and_its_end_is_the_start(recipe, tmp_path):
    text = f"{{kind: text, path: {tmp_path / 'text.txt'}}}"
    wanted = ["train.pretrain={max_steps: 6, batch_size: 4, warmup_steps: 1}", "export.dtype=float32"]
    generated = f"data.generate={{num_records: 4, max_new_tokens: 4, prompt_tokens: 6, prompts: {text}}}"
    more = [generated, f"data.sources=[{{kind: generated, weight: 9}}, {text}]"]
    fit(load_recipe(recipe, wanted + more), tmp_path / "run")
    folder = tmp_path / "run"
    ours, kept = (load_file(folder / name / "model.safetensors") for name in ("start", "pretrain/last"))
    assert all(torch.equal(ours[key], kept[key]) for key in kept)
    last = curve(folder / "pretrain")[-1]
    assert last[0] == "6"
    # One record is a window of 40 tokens of plain text, all but its first a label; a generated one is shorter.
    assert int(last[COLUMNS.index("tokens")]) == 6 * 4 * 40
    for unread in ("", ", {kind: stdlib, weight: 0}"):
        with pytest.raises(RecipeError, match="needs plain text"):
            load_recipe(recipe, [*wanted, generated, f"data.sources=[{{kind: generated}}{unread}]"])


@pytest.mark.long
def test_compare_recipes_and_export_need_neither_lightning_nor_deepspeed(finished):
    out = finished.parent / "compared"
    few = ["eval.num_prompts=2", "eval.max_new_tokens=4", "eval.speed_prompts=0"]
    asked = ["--prompts", finished.parent / "prompts.jsonl", "--out", out, "--answers", out]
    words = ["compare", finished / "drafter", finished / "start", *few, *asked]
    command = [sys.executable, "-m", "tests.commands.without_trainer", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "A - B" in done.stdout
    written = [
        "A-temperature-0.jsonl",
        "B-temperature-0.jsonl",
        "plain-temperature-0.jsonl",
        "eval.json",
        "report.html",
    ]
    assert all((out / name).is_file() for name in written)
    assert "block efficiency" in done.stdout
