"""A drafter trained on hidden states from another process, stored or in every step, is the one of the loaded target."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.pipeline.data import check_data_engines
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.target_model.anatomy import blocks
from drafttrain.training.result import folder_of_step, kept_steps
from tests.data_gen.states.plain_source import registered
from tests.training.kills import rows

RECIPE = """
name: eagle
target: {{model: {target}, dtype: float32}}
drafter: {{kind: eagle3, num_steps: 2, draft_vocab_size: null}}
loss: {{kind: forward_kl}}
data: {{max_length: 24, cache: states, overlap_ngram: 0, sources: [{{kind: text, path: {text}}}]}}
train: {{max_steps: {steps}, batch_size: 4, warmup_steps: 1, log_every_steps: 1, eval_every_steps: 2, eval_prompts: 2, keep_best: 3, lr: 0.01, loggers: [csv],
        target_placement: absent}}
eval: {{num_prompts: 2, max_new_tokens: 6, prompt_tokens: 6, prompts: {prompts}, validation_prompts: {prompts}}}
"""
ENGINE = "data.states={kind: plain}"
STEPS = 4
LIVE = "data.cache=none"


def written_recipe(folder: Path, target: Path) -> Path:
    """Write a recipe with its texts and prompts, and return its path."""
    lines = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(4)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and then it sleeps; " * 20)
    files = {"prompts": folder / "prompts.jsonl", "text": folder / "text.txt"}
    (folder / "eagle.yaml").write_text(RECIPE.format(target=target, steps=STEPS, **files))
    return folder / "eagle.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, save_llama: Any) -> Iterator[Path]:
    with registered():
        yield written_recipe(tmp_path_factory.mktemp("recipe"), save_llama(num_layers=4))


def trained(recipe: Path, folder: Path, *overrides: str) -> DrafterRun:
    """Train a drafter, without the evaluation that needs a target."""
    run = DrafterRun(load_recipe(recipe, list(overrides)), folder, placement="absent")
    run.train()
    return run


def check_equal(one: Path, other: Path) -> None:
    """Require equal losses, figures and weights, up to rounding."""
    curves = [[float(row["loss"]) for row in rows(folder) if row["loss"]] for folder in (one, other)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert min(abs(a - b) for a, b in itertools.pairwise(curves[0])) > 1e-2, "steps differ by more than that"
    figures = [{kept["step"]: kept["alpha"] for kept in kept_steps(folder)} for folder in (one, other)]
    assert len(figures[0]) == 3
    # Greedy acceptance of 12 tokens; one may be a near tie.
    assert figures[0] == pytest.approx(figures[1], abs=0.1)
    last = [load_file(folder_of_step(folder, STEPS) / "model.safetensors") for folder in (one, other)]
    for name, tensor in last[0].items():
        assert float((tensor - last[1][name]).norm()) <= 1e-3 * float(tensor.norm()), name


@pytest.mark.long
def test_a_drafter_trained_on_states_of_another_process_is_that_of_the_target(recipe: Path, tmp_path: Path) -> None:
    trained(recipe, tmp_path / "own")
    gen(load_recipe(recipe, [ENGINE]), tmp_path / "engine")
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "engine").rglob("*.npy")}
    assert {path.name for path in stored} >= {"hidden_1-00000.npy", "hidden_2-00000.npy", "final-00000.npy"}
    # It is the same run whoever computes what is missing, and nothing is.
    run = trained(recipe, tmp_path / "engine")
    assert all(parameter.is_meta for parameter in blocks(run.target.model).parameters())
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    check_equal(tmp_path / "own", tmp_path / "engine")
    live = trained(recipe, tmp_path / "live", ENGINE, LIVE)
    assert all(parameter.is_meta for parameter in blocks(live.target.model).parameters())
    assert not list((tmp_path / "live").glob("data/*-cache"))
    check_equal(tmp_path / "own", tmp_path / "live")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([ENGINE, "train.target_placement=replicated"], "the target's blocks are not loaded here: set train.target_pl"),
        (
            [ENGINE, "data.generate={prompts: {kind: text, path: x}}", "data.sources=[{kind: generated}]"],
            "choose another data.generate.backend than builtin",
        ),
        (["data.states={kind: vllm, tensor_parallel_size: 2}"], "one process uses several GPUs: set train.devices: 1"),
        (["data.states={kind: vllm, tensor_parallel_size: 2}", "train.devices=1"], None),
        (["data.states={kind: vllm}", "target.device=cuda:1"], "vLLM takes the first GPUs that it sees"),
        ([ENGINE, LIVE], None),
        ([LIVE], "nothing of the target is stored with data.cache none"),
        ([ENGINE, "drafter={kind: causal_lm, init: target}"], "absent: drafter.init: target cuts the drafter from"),
        (["data.states={kind: vlm}"], "unknown source of hidden states 'vlm'. Did you mean 'vllm'?"),
    ],
)
def test_what_an_engine_does_not_allow_is_found_in_the_recipe(
    overrides: list[str], expected: str | None, recipe: Path
) -> None:
    if expected is None:
        load_recipe(recipe, overrides)
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert expected in str(caught.value)


def test_vllm_that_is_missing_is_reported_before_anything_is_loaded(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "engines"))
    loaded = load_recipe(recipe, ["data.states={kind: vllm}"])
    with pytest.raises(RecipeError, match="vllm is not installed here: drafttrain engines install vllm; or let"):
        check_data_engines(loaded, tmp_path)
    (tmp_path / "0-cache").mkdir()
    (tmp_path / "0-cache" / "cache.json").write_text("{}")
    check_data_engines(loaded, tmp_path)
