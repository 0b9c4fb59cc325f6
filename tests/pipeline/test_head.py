"""A head's recipe on the path: label, train, export, eval; resumed, and its frozen models as they were."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.commands.evaluate import evaluate_drafter
from drafttrain.commands.fit import fit
from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, GateError, RecipeError
from drafttrain.core.files import sha256_of
from drafttrain.data_gen.stored.labelled_tokens import LabelledTokens
from drafttrain.pipeline.head_run import HeadRun
from drafttrain.training.metrics_log import TIMES

RECIPE = """
name: head
target: {{model: {target}}}
head: {{kind: acceptance, drafter: {drafter}, num_blocks: 1}}
data:
  max_length: 40
  sources: [{{kind: text, path: {text}}}]
  annotate: {{kind: acceptance, held_out: 0.3}}
train:
  {{max_steps: 12, batch_size: 16, records_per_device: 8, warmup_steps: 2, log_every_steps: 1, checkpoint_every_steps: 3,
   eval_every_steps: 6, loggers: [csv]}}
eval: {{num_prompts: 2, max_new_tokens: 8, prompt_tokens: 6, speed_prompts: 0, prompts: {prompts},
       validation_prompts: {prompts}, temperatures: [0.0], length: {{kind: cumulative_reject}},
       also: [{{kind: expected_cost}}, {{kind: fixed, num_draft_tokens: 2}}]}}
"""


@pytest.fixture
def recipe(tmp_path, tiny_folder, save_llama) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    lines = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    drafter = save_llama(seed=0, num_layers=1)
    path = tmp_path / "head.yaml"
    path.write_text(
        RECIPE.format(
            target=tiny_folder, drafter=drafter, text=tmp_path / "text.txt", prompts=tmp_path / "prompts.jsonl"
        )
    )
    return path


@pytest.mark.usefixtures("evaluated_here")
def test_a_head_goes_all_the_way_and_its_models_stay_as_they_are(recipe, tmp_path, save_llama, capfd):
    loaded = load_recipe(recipe)
    frozen = [Path(loaded.head.drafter) / "model.safetensors", Path(loaded.target.model) / "model.safetensors"]
    before = [sha256_of(path) for path in frozen]
    folder = tmp_path / "run"
    fit(loaded, folder)
    assert [sha256_of(path) for path in frozen] == before
    for name in ("metrics.csv", "eval.json", "report.html", "head/README.md", "head/config.json", "start/config.json"):
        assert (folder / name).stat().st_size > 0, name
    result = json.loads((folder / "eval.json").read_text())
    part = result["temperatures"][0]
    names = ["drafter", "drafter (expected_cost)", "drafter (fixed 2)"]
    assert list(part["drafters"]) == names
    assert all(part["drafters"][name]["parity"]["exact"] for name in names)
    assert all(part["comparisons"][f"drafter - {name}"]["speed"]["value"] > 0 for name in names[1:])
    held_out = result["head"]["held_out"]
    assert list(held_out) == ["untrained", "trained", "trained, not prior-corrected"]
    assert result["head"]["made_for"]["drafter"] == loaded.head.drafter
    assert (folder / "report.html").read_text().count("data:image/svg+xml") == 5
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["validation_ece"]] == ["0", "6", "12"]
    capfd.readouterr()
    fit(loaded, folder)
    assert capfd.readouterr().err.count("done before, skipped") == 2
    # Its head goes with these two models and with no others.
    with_head = [
        *(f"eval.{key}={value}" for key, value in {"prompts": loaded.eval.prompts, "num_prompts": 1}.items()),
        *("eval.max_new_tokens=2", "eval.temperatures=[0]", "eval.speed_prompts=0"),
        f"eval.length={{kind: cumulative_reject, head: {folder / 'head'}}}",
    ]
    evaluate_drafter(loaded.head.drafter, loaded.target.model, with_head, out=tmp_path)
    other = str(save_llama(seed=7, num_layers=1))
    with pytest.raises(CheckpointError, match=r"made for the drafter \S+ \(\w+\), not \S+ \(\w+\)\. Train a head"):
        evaluate_drafter(other, loaded.target.model, with_head, out=tmp_path)


def test_a_head_is_trained_where_its_target_is(recipe, tmp_path):
    """On `meta`, where no trainer can be: before, a head stayed on the CPU wherever its target was."""
    gen(load_recipe(recipe), tmp_path / "run")
    elsewhere = load_recipe(recipe, ["target.device=meta"])
    with pytest.raises(ValueError, match="accelerator='meta'"):
        HeadRun(elsewhere, tmp_path / "elsewhere").fit_head(LabelledTokens(tmp_path / "run" / "data" / "labelled"))


DRAFTER = """
name: made
target: {{model: null, tokenizer: {tokenizer}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: ce}}
data: {{max_length: 40, sources: [{{kind: text, path: {text}}}], overlap_ngram: 0}}
train: {{max_steps: 4, batch_size: 4, warmup_steps: 1, eval_every_steps: 0, loggers: [csv]}}
"""


def test_a_model_that_another_recipe_makes_is_made_first_and_once(recipe, tmp_path, tiny_folder, capfd):
    made, runs = tmp_path / "made.yaml", tmp_path / "runs"
    made.write_text(DRAFTER.format(tokenizer=tiny_folder, text=tmp_path / "text.txt"))
    loaded = load_recipe(recipe, [f"head.drafter=recipe:{made}"])
    for first in (True, False):
        gen(loaded, runs / "head")
        said = capfd.readouterr().err
        assert f"head: drafter is the model of made: {runs / 'made'}" in said
        assert ("training: done before, skipped" in said) is not first
    assert load_recipe(runs / "head").head.drafter == str(runs / "made" / "drafter")
    assert (runs / "made" / "drafter" / "model.safetensors").exists()
    assert loaded.head.drafter == f"recipe:{made}", "the recipe that was given is not changed"
    made.write_text(
        made.read_text().replace("num_layers", f"init: checkpoint, checkpoint: 'recipe:{made}', num_layers")
    )
    with pytest.raises(RecipeError, match="cannot need its own model: head needs made needs made"):
        gen(loaded, tmp_path / "other" / "head")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["{kind: kangaroo, exit_layer: 2}", "{kind: eagle3, draft_vocab_size: 120}", "{kind: eagle}"]
)
def test_a_head_of_a_drafter_on_the_targets_features_goes_all_the_way(recipe, tmp_path, save_llama, kind):
    target, made = save_llama(seed=3, num_layers=4), tmp_path / "made.yaml"
    small = "eval: {{num_prompts: 1, max_new_tokens: 2, temperatures: [0.0], speed_prompts: 0, prompts: {0}, validation_prompts: {0}}}"
    text = DRAFTER.format(tokenizer=target, text=tmp_path / "text.txt").replace("model: null", f"model: {target}")
    text = text.replace("{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}", kind)
    made.write_text(text.replace("kind: ce", "kind: forward_kl") + small.format(tmp_path / "prompts.jsonl"))
    changes = [f"head.drafter=recipe:{made}", f"target.model={target}", "head.rms_norm=true"]
    fit(load_recipe(recipe, changes), tmp_path / "runs" / "head")
    result = json.loads((tmp_path / "runs" / "head" / "eval.json").read_text())
    assert all(one["parity"]["exact"] for one in result["temperatures"][0]["drafters"].values())
    assert result["head"]["made_for"]["drafter"] == str(tmp_path / "runs" / "made" / "drafter")


@pytest.mark.slow
def test_a_head_below_the_gate_is_set_aside(recipe, tmp_path):
    with pytest.raises(GateError, match=r"required 12"):
        fit(load_recipe(recipe, ["export.require.block_efficiency=12"]), tmp_path / "run")
    assert (tmp_path / "run" / "head.rejected" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "head").exists()


@pytest.mark.slow
def test_a_killed_training_of_a_head_continues_bit_for_bit(recipe, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    slow = ["train.max_steps=600", "train.eval_every_steps=300", "eval.also=[]"]

    def command(runs: Path) -> list[str]:
        return [sys.executable, "-m", "drafttrain", "fit", str(recipe), *slow, "--runs", str(runs)]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command(broken), env=environment, stderr=subprocess.PIPE)
    checkpoints = broken / "head" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it was killed"
    assert not (broken / "head" / "train.json").exists()
    subprocess.run(command(broken), check=True, env=environment, capture_output=True)
    rows = []
    for folder in (whole, broken):
        with (folder / "head" / "metrics.csv").open(newline="") as file:
            rows.append([tuple(v for k, v in row.items() if k not in TIMES) for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    ours, theirs = (load_file(folder / "head" / "last" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
