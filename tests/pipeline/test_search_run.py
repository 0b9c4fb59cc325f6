"""A recipe of a drafter that is searched: fit, resume, read back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.config.load import load_recipe, read_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.export import exporters
from drafttrain.pipeline.kinds import kind_of_run
from drafttrain.pipeline.plan import plan_of
from drafttrain.pipeline.search_run import SearchRun
from drafttrain.serving.engines import engines

RECIPE = """
name: searched
target: {{model: {target}, dtype: float32}}
drafter: {{kind: layer_skip, ratio: 0.5, window: 8}}
data: {{max_length: 40, sources: [{{kind: text, path: {text}}}]}}
train: {{max_steps: 6, batch_size: 4, warmup_steps: 0}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, save_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 30)
    (folder / "searched.yaml").write_text(RECIPE.format(target=save_llama(num_layers=5), text=folder / "text.txt"))
    return folder / "searched.yaml"


def fitted(recipe: Path, folder: Path, *overrides: str) -> SearchRun:
    """Search and export, without the evaluation."""
    made = load_recipe(recipe, list(overrides))
    assert kind_of_run(made) is SearchRun
    run = SearchRun(made, folder)
    run.train()
    run.export_best()
    return run


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_a_search_that_was_stopped_ends_with_the_same_files(recipe, tmp_path):
    """After a kill there are some scores, and neither `last` nor train.json."""
    whole = fitted(recipe, tmp_path / "whole")
    log = whole.folder.search.read_text()
    assert len(log.splitlines()) == 6
    assert not list((tmp_path / "whole").glob("checkpoints/*"))
    stopped = SearchRun(load_recipe(recipe), tmp_path / "stopped")
    stopped.folder.search.write_text("".join(log.splitlines(keepends=True)[:3]))
    assert stopped.folder.has_weights()
    assert stopped.weights_so_far().last_step == 3
    assert not stopped.folder.train_done.exists()
    again = fitted(recipe, tmp_path / "stopped")
    assert again.folder.search.read_text() == log
    assert config_of(again.folder.drafter) == config_of(whole.folder.drafter)
    best = max(json.loads(line)["matchness"] for line in log.splitlines())
    assert config_of(whole.folder.drafter)["matchness"] == best
    assert config_of(whole.folder.start)["matchness"] is None


def test_scores_of_another_recipe_are_not_continued(recipe, tmp_path):
    fitted(recipe, tmp_path)
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        fitted(recipe, tmp_path, "drafter.window=9")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss={kind: ce}"], "loss: drafter.kind layer_skip has no weights to train"),
        (["data.cache=states"], "data.cache: the search of drafter.kind layer_skip runs the target itself"),
        (["train.devices=2"], "train.devices: drafter.kind layer_skip is searched by one process: set 1, got 2"),
        (["train.device=cpu"], "train.device: drafter.kind layer_skip runs the target's blocks"),
        (["train.compile=true"], "train.compile: drafter layer_skip has no part to compile"),
        (["target.model=null", "target.tokenizer=x"], "drafter: layer_skip is made from its target"),
        (["train.target_placement=absent", "data.cache=states"], "kind layer_skip runs the target's own blocks"),
        (["drafter.ratio=1"], "drafter.ratio"),
    ],
)
def test_what_a_search_would_ignore_is_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_no_format_holds_it_and_the_refusal_names_each(recipe):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, [f"export.to=[{','.join(exporters.names())}]"])
    for name in exporters.names():
        assert f"export.to: {name} does not support drafter.kind layer_skip" in str(refused.value)


def test_no_engine_runs_it(recipe):
    assert all("layer_skip" not in engines.entry(name).component.methods for name in engines.names())  # type: ignore[attr-defined]


def test_its_training_is_not_planned(recipe):
    with pytest.raises(RecipeError, match="layer_skip has no weights to train"):
        plan_of(load_recipe(recipe), None)


def test_swift_needs_the_set_that_it_starts_with(recipe):
    beside = "eval.beside=[{kind: swift, start: drafter}]"
    assert load_recipe(recipe, [beside]).eval.beside[0].reads_drafter
    with pytest.raises(RecipeError, match=r"swift with start: drafter needs drafter\.kind layer_skip"):
        load_recipe("tiny_medusa", [beside])


def test_other_drafters_still_need_a_loss(recipe):
    text = recipe.read_text().replace("kind: layer_skip, ratio: 0.5, window: 8", "kind: medusa")
    with pytest.raises(RecipeError, match="loss: missing"):
        read_recipe(text, source="medusa.yaml")
