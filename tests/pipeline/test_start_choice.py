"""What a drafter's start leaves to training texts is chosen once a run, and read by every later process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.files import write_json
from drafttrain.core.foreign import read_json
from drafttrain.drafters.causal_lm.cut import cut_from
from drafttrain.drafters.causal_lm.cut_choice import CutChoice
from drafttrain.drafters.causal_lm.cut_settings import CutSettings
from drafttrain.drafters.causal_lm.dense import dense_from
from drafttrain.drafters.causal_lm.module import CausalLMSettings
from drafttrain.pipeline.data import training_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.plan import plan_of
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.loading import load_causal_lm
from tests.conftest import byte_tokenizer
from tests.drafters.test_dense import mixture

RECIPE = """
name: cut
target: {{model: {target}, dtype: float32}}
drafter: {{kind: causal_lm, init: target, num_layers: 2, cut: {{layers: ablation, texts: 4}}}}
loss: {{kind: ce}}
data: {{max_length: 40, sources: [{{kind: text, path: {text}}}]}}
train: {{max_steps: 2, batch_size: 2, warmup_steps: 0}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, save_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 30)
    (folder / "cut.yaml").write_text(RECIPE.format(target=save_llama(num_layers=4), text=folder / "text.txt"))
    return folder / "cut.yaml"


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_layers_are_chosen_once_on_the_texts_of_the_run(recipe: Path, tmp_path: Path) -> None:
    run = DrafterRun(load_recipe(recipe), tmp_path / "run")
    training_data(run)
    assert not run.folder.choice.exists(), "nothing needed the drafter yet"
    drafter: Any = run.drafter
    choice = read_json(run.folder.choice)
    assert len(choice["layers"]) == 2
    assert sorted(one["layer"] for one in choice["removed"]) == sorted({0, 1, 2, 3} - {*choice["layers"]})
    assert same(drafter.model, cut_from(run.target.model, choice["layers"], width=None))
    # A later process does not choose again: it starts from what is stored, whatever that is.
    others = sorted({0, 1, 2, 3} - {*choice["layers"]})
    write_json(run.folder.choice, choice | {"layers": others})
    later: Any = DrafterRun(load_recipe(recipe), tmp_path / "run").drafter
    assert same(later.model, cut_from(run.target.model, others, width=None))
    assert not same(later.model, drafter.model), "the control"


def test_another_recipe_or_another_text_chooses_again(recipe: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("pack my box with five dozen liquor jugs; " * 30)
    source = f"data.sources=[{{kind: text, path: {text}}}]"

    def chosen(*overrides: str) -> list[int]:
        run = DrafterRun(load_recipe(recipe, [source, *overrides]), folder)
        training_data(run)
        assert len(blocks(run.drafter.model)) == run.recipe.drafter.num_layers
        layers: list[int] = read_json(run.folder.choice)["layers"]
        return layers

    assert len(chosen()) == 2
    assert len(chosen("drafter.num_layers=3")) == 3, "nothing is trained yet, so the recipe may change"
    write_json(folder / "choice.json", {"layers": [9, 9, 9]})
    text.write_text("sphinx of black quartz, judge my vow; " * 30)
    assert 9 not in chosen("drafter.num_layers=3"), "the texts that it was chosen on have changed"


def test_a_plan_needs_no_text(recipe: Path) -> None:
    cut = cut_from(load_causal_lm(Path(str(load_recipe(recipe).target.model))), [0, 3], width=None)
    chosen, given = (
        plan_of(load_recipe(recipe, overrides), None) for overrides in ([], ["drafter.cut={layers: [0, 3]}"])
    )
    assert chosen.cost.trained == given.cost.trained == sum(p.numel() for p in cut.parameters())
    assert chosen.cost.needed == given.cost.needed


def test_experts_are_chosen_by_the_routing_of_the_texts(recipe: Path, tmp_path: Path) -> None:
    model, target = mixture("qwen3_moe"), tmp_path / "mixture"
    model.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    overrides = [f"target.model={target}", "drafter.cut={layers: last, experts: 2, texts: 4}"]
    made = load_recipe(recipe, overrides)
    run = DrafterRun(made, tmp_path / "run")
    training_data(run)
    drafter: Any = run.drafter
    shares = read_json(run.folder.choice)["shares"]
    assert [len(one) for one in shares] == [0, 4, 4]
    whole = dense_from(run.target.model, CutSettings(experts=2, shares=shares))
    assert same(drafter.model, cut_from(whole, [1, 2], width=None))
    assert plan_of(made, None).cost.trained == sum(p.numel() for p in drafter.parameters())


def test_a_cut_needs_a_target(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"drafter\.init: there is no target to cut the drafter from"):
        load_recipe(recipe, ["target.model=null", "target.tokenizer=x"])
    with pytest.raises(RecipeError, match=r"drafter\.cut\.layers: 3 layers are listed, and num_layers is 2"):
        load_recipe(recipe, ["drafter.cut={layers: [0, 1, 2]}"])
    with pytest.raises(RecipeError, match=r"drafter\.cut\.layers"):
        load_recipe(recipe, ["drafter.cut={layers: middle}"])


@pytest.mark.parametrize("layers", [None, ["a", "b"], [2, 1], [0], [0, 0], "all"])
def test_a_damaged_choice_is_refused_by_name(layers):
    given = CausalLMSettings(init="target", num_layers=2, cut=CutSettings(layers="ablation"))
    with pytest.raises(CheckpointError, match=r"choice\.json: layers must be 2 different whole numbers"):
        CutChoice(given).settings({"layers": layers} if layers is not None else {})
    assert CutChoice(given).settings({"layers": [0, 3]}).cut.layers == [0, 3]
