"""`drafttrain fit` in two processes gives the data and the drafter of one process, and refuses within seconds."""

from __future__ import annotations

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

from drafttrain.commands.export import export_run
from drafttrain.commands.fit import fit
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DrafttrainError, Interrupted, RecipeError
from drafttrain.distributed.world import without_launcher

RECIPE = """
name: pair
target: {{model: {target}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: forward_kl}}
data:
  max_length: 24
  cache: top_k
  cache_top_k: 8
  overlap_ngram: 40
  generate: {{num_records: 12, records_per_shard: 3, max_new_tokens: 10, prompt_tokens: 6,
             prompts: {{kind: jsonl, path: {prompts}}}}}
  sources: [{{kind: generated}}]
train: {{max_steps: 6, batch_size: 4, warmup_steps: 2, log_every_steps: 1, eval_every_steps: 3, checkpoint_every_steps: 4,
        eval_prompts: 2, loggers: [csv]}}
eval: {{num_prompts: 2, max_new_tokens: 6, prompt_tokens: 6, speed_prompts: 1, prompts: {prompts},
       validation_prompts: {prompts}}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Path:
    lines = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    path = tmp_path / "pair.yaml"
    path.write_text(RECIPE.format(target=tiny_folder, prompts=tmp_path / "prompts.jsonl"))
    return path


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run drafttrain in a subprocess."""
    return subprocess.run(
        [sys.executable, "-m", "drafttrain", *map(str, words)],
        env=without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.processes
def test_two_processes_make_the_data_and_the_drafter_of_one(recipe: Path, tmp_path: Path) -> None:
    operators = tmp_path / "operators"
    done = command(
        *("fit", recipe, "--runs", tmp_path / "two", "train.devices=2", "train.deepspeed.stage=3"),
        TORCH_EXTENSIONS_DIR=str(operators),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not operators.exists(), "an operator was built at start"
    fit(load_recipe(recipe), tmp_path / "one" / "pair")
    one, two = tmp_path / "one" / "pair", tmp_path / "two" / "pair"
    for made in [*(one / "data").rglob("*.jsonl"), *(one / "data").rglob("*.npy")]:
        other = two / made.relative_to(one)
        assert other.read_bytes() == made.read_bytes(), made.name
    for name, weight in load_file(one / "drafter" / "model.safetensors").items():
        torch.testing.assert_close(load_file(two / "drafter" / "model.safetensors")[name], weight, atol=1e-6, rtol=1e-5)
    assert "2 processes on 1 host" in done.stderr
    assert done.stderr.count("training: done") == 1, "only the first process speaks"


@pytest.mark.processes
def test_answers_of_the_drafter_do_not_depend_on_the_number_of_processes(recipe: Path, tmp_path: Path) -> None:
    asked = ["data.cache=none", "data.on_policy={fraction: 0.75, drafter_share: 0.7, max_new_tokens: 9, batch_size: 1}"]
    asked += ["data.on_policy.every_steps=2", "train.records_per_device=1"]
    layout = ("train.devices=2", "train.deepspeed.stage=2")
    done = command("fit", recipe, "--runs", tmp_path / "two", *asked, *layout)
    assert done.returncode == 0, done.stderr[-4000:]
    weights = {}
    for name, further in (("one", []), ("other_seed", ["seed=1"])):
        fit(load_recipe(recipe, [*asked, *further]), tmp_path / name / "pair")
        weights[name] = load_file(tmp_path / name / "pair" / "drafter" / "model.safetensors")
    two = load_file(tmp_path / "two" / "pair" / "drafter" / "model.safetensors")
    for name, weight in weights["one"].items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4)
    assert any((two[name] - weight).abs().max() > 1e-2 for name, weight in weights["other_seed"].items()), "control"
    columns = [path.read_text().splitlines()[0].split(",") for path in tmp_path.glob("*/pair/metrics.csv")]
    assert all("drawn_share" in names for names in columns)


@pytest.mark.long
def test_a_refusal_takes_seconds_and_is_not_retried(recipe: Path, tmp_path: Path) -> None:
    layout = ("train.devices=2", "train.max_restarts=2")
    done = command("fit", recipe, "--runs", tmp_path, *layout, "train.batch_size=0")
    assert done.returncode == RecipeError.exit_code, done.stderr[-2000:]
    assert "train.batch_size" in done.stderr
    assert "restart" not in done.stderr, "what was refused would be refused again"


@pytest.mark.processes
def test_a_request_to_stop_reaches_all_processes_and_the_same_command_continues(recipe: Path, tmp_path: Path) -> None:
    steps = ("train.max_steps=4000", "train.eval_every_steps=0", "train.checkpoint_every_steps=4000")
    words = ["fit", str(recipe), "--runs", str(tmp_path / "two"), "train.devices=2", *steps]
    environment = without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    log = tmp_path / "log"
    running = subprocess.Popen(
        [sys.executable, "-m", "drafttrain", *words], env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT
    )
    metrics, limit = tmp_path / "two" / "pair" / "metrics.csv", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < limit, log.read_text()[-3000:]
        assert running.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == Interrupted.exit_code, log.read_text()[-3000:]
    (saved,) = (tmp_path / "two" / "pair" / "checkpoints").glob("step-*.ckpt")
    assert 1 <= int(saved.stem.removeprefix("step-")) < 4000
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "two")], capture_output=True, text=True, check=False).stdout
    assert not left, f"still running: {left}"


@pytest.mark.processes
@pytest.mark.usefixtures("evaluated_here")
def test_an_unfinished_training_is_exported_from_its_checkpoint(recipe: Path, tmp_path: Path) -> None:
    loaded, folder = load_recipe(recipe, ["train.eval_every_steps=0"]), tmp_path / "run"
    fit(loaded, folder)
    whole = load_file(folder / "drafter" / "model.safetensors")
    (folder / "train.json").unlink()
    export_run(loaded, folder)
    early = load_file(folder / "drafter" / "model.safetensors")
    stored = torch.load(folder / "checkpoints" / "step-00000004.ckpt")["state_dict"]
    assert all(torch.equal(stored[f"trained.model.{name}"], weight) for name, weight in early.items())
    assert any(not torch.equal(early[name], whole[name]) for name in whole)
    # The training continues, and its end is exported instead.
    fit(loaded, folder)
    final = load_file(folder / "drafter" / "model.safetensors")
    assert all(torch.equal(final[name], whole[name]) for name in whole)
    with pytest.raises(DrafttrainError, match="nothing is trained here yet"):
        export_run(loaded, tmp_path / "empty")


@pytest.mark.long
@pytest.mark.usefixtures("evaluated_here")
def test_a_checkpoint_of_adapters_does_not_contain_the_target(tiny_folder: Path, recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace(
        "{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}",
        "{kind: medusa, num_heads: 1, num_layers: 1, joint: {lora: {rank: 2}}}",
    )
    recipe.write_text(text.replace("cache: top_k", "cache: none"))
    fit(load_recipe(recipe), tmp_path / "run")
    stored = torch.load(tmp_path / "run" / "checkpoints" / "step-00000004.ckpt")["state_dict"]
    assert any("adapter" in name for name in stored)
    trained = sum(value.numel() for value in stored.values())
    head = 257 * 32 + 32 * 32 + 32
    low_rank = 2 * 2 * (2 * 32 + 32 + 16)
    assert trained == head + low_rank, sorted(stored)
