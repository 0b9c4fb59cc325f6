"""The real recipe: every bundled file loads, dumps to an equal one, shrinks, and fits its schema."""

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from drafttrain.config.bundled import bundled_recipes, find_recipe, is_recipe, title_of
from drafttrain.config.dump import dump_recipe
from drafttrain.config.fields import fields_of
from drafttrain.config.load import load_recipe, load_sections, read_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.config.schema import recipe_schema
from drafttrain.core.errors import RecipeError
from drafttrain.core.registry import components_of
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.target_model import TargetSettings

BUNDLED = [recipe.path for recipe in bundled_recipes()]
DEMO = find_recipe("demo")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, overrides, source="recipe.yaml")
    return list(caught.value.problems)


def test_sections_have_one_order():
    names = [
        "name",
        "seed",
        "plugins",
        "target",
        "drafter",
        "head",
        "loss",
        "data",
        "train",
        "eval",
        "export",
        "online",
    ]
    assert list(fields_of(Recipe)) == names


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_dumped_recipe_loads_to_an_equal_one(path):
    recipe = load_recipe(path)
    for comments in (False, True):
        text = dump_recipe(recipe, comments=comments)
        again = read_recipe(text, source="dumped")
        assert again == recipe
        assert [one.kind for one in components_of(again)] == [one.kind for one in components_of(recipe)]
        assert dump_recipe(again, comments=comments) == text


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_bundled_recipe_keeps_the_order_of_sections_and_opens_with_what_it_trains(path):
    text = path.read_text(encoding="utf-8")
    order = list(fields_of(Recipe))
    given = list(yaml.safe_load(text))
    assert given == sorted(given, key=order.index)
    assert title_of(text)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_smoke_shrinks_any_recipe_and_leaves_a_valid_one(path):
    whole, small = load_recipe(path), load_recipe(path, smoke=True)
    assert small.train.max_steps <= 20
    assert small.name == f"{whole.name}-smoke"
    assert (small.target, small.seed) == (whole.target, whole.seed)
    again = read_recipe(dump_recipe(small), source="smoke")
    assert again == small
    assert dump_recipe(again) == dump_recipe(small)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_bundled_recipe_and_its_dump_fit_the_schema(path, schema):
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(dump_recipe(load_recipe(path))))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


def broken(demo: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield recipes with one thing wrong each."""
    for what, path, value in [
        ("unknown key", ("train", "learning_rate"), 1),
        ("unknown section", ("trian",), {}),
        ("out of range", ("train", "lr"), -1),
        ("wrong type", ("train", "max_steps"), "many"),
        ("wrong choice", ("train", "schedule"), "cosin"),
        ("unknown kind", ("loss", "kind"), "tvdp"),
    ]:
        wrong = copy.deepcopy(demo)
        place = wrong
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
        yield what, wrong
    yield "no drafter", {key: value for key, value in demo.items() if key != "drafter"}


@pytest.mark.parametrize("number", range(7))
def test_what_the_schema_refuses_the_loader_refuses(number, schema):
    what, wrong = list(broken(yaml.safe_load(DEMO.read_text(encoding="utf-8"))))[number]
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(wrong)), what
    assert problems(yaml.safe_dump(wrong)), what


def test_problems_have_the_form_of_the_design():
    text = (
        "name: bad\n\ndrafter:\n  kind: causal_lm\n  num_layer: 3\n\nloss:\n  kind: tvdp\ntrain:\n  learning_rate: 1\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe(text, ["data={}"], source="recipes/bad.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("recipes/bad.yaml: ")
    assert "  line 5: drafter.num_layer: unknown key. Did you mean 'num_layers'?" in lines
    available = ", ".join(losses.names())
    assert f"  line 8: loss.kind: unknown loss 'tvdp'. Did you mean 'tvdpp'? Available: {available}" in lines
    assert any(
        line.startswith("  line 10: train.learning_rate: unknown key. Keys here: pretrain, max_steps, ")
        for line in lines
    )


def test_online_learning_asks_for_logs_and_for_a_rate_that_stays():
    found = problems(DEMO.read_text(encoding="utf-8") + "\nonline: {every_minutes: 5}\n")
    assert [problem.partition(": ")[2].partition(":")[0] for problem in found] == ["online.every_requests"]
    found = problems(DEMO.read_text(encoding="utf-8") + "\nonline: {}\n")
    assert {problem.partition(": ")[2].partition(":")[0] for problem in found} == {
        "data.sources",
        "data",
        "train.schedule",
    }


HEAD = """
name: h
head: {kind: acceptance}
data:
  sources: [{kind: text, path: x}]
  annotate: {kind: acceptance}
"""


def test_a_recipe_trains_a_drafter_or_a_head():
    assert read_recipe(HEAD, source="h.yaml").loss is None
    found = problems(HEAD, "drafter={kind: causal_lm}", "loss={kind: ce}", "data.annotate=null")
    assert [problem.rpartition("}: ")[2] for problem in found] == [
        "line 3: head: a recipe trains a drafter or a head: name the frozen drafter in head.drafter",
        "loss: head acceptance has its own loss: leave the section out",
        "override data.annotate=null: data.annotate: head acceptance needs labels of kind acceptance",
    ]
    assert problems(HEAD, "head=null") == [
        "line 1: drafter: missing. The drafter to train, by kind; or give a head.",
        "line 1: loss: missing. The loss of a drafter, by kind; a head has its own.",
    ]
    drafter = ["head=null", "drafter={kind: causal_lm}", "loss={kind: ce}"]
    assert problems(HEAD, *drafter) == [
        "line 6: data.annotate: labels are for a head, and this recipe does not train one"
    ]


def test_a_loss_that_compares_with_the_target_needs_one():
    text = DEMO.read_text(encoding="utf-8")
    found = problems(text, "target.model=null", "target.tokenizer=builtin:target", "loss={kind: tvdpp}")
    assert "override loss={kind: tvdpp}: loss: tvdpp compares with the target, but target.model is null" in found


def test_a_sum_needs_the_target_that_its_terms_need():
    text = DEMO.read_text(encoding="utf-8")
    arguments = ["target={model: null, tokenizer: 'builtin:target'}", "loss.kind=sum"]
    assert read_recipe(text, [*arguments, "loss.terms=[{loss: {kind: ce}}]"], source="x").target.model is None
    found = problems(text, *arguments, "loss.terms=[{loss: {kind: ce}}, {loss: {kind: tvd}}]")
    assert [p.partition("loss: ")[2] for p in found if "compares with the target" in p] == [
        "tvd compares with the target, but target.model is null"
    ]


def test_a_recipe_that_is_not_utf8_says_so_and_a_mark_of_its_order_is_no_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + DEMO.read_bytes())
    assert load_recipe(path) == load_recipe("demo")


def test_a_drafter_cut_out_of_the_target_needs_one():
    found = problems(
        DEMO.read_text(encoding="utf-8"),
        "target={model: null, tokenizer: 'builtin:target'}",
        "drafter={kind: causal_lm, init: target}",
    )
    assert any("there is no target to cut the drafter from" in problem for problem in found)


def test_a_run_folder_is_a_recipe_and_a_drafter_folder_is_none(tmp_path):
    (tmp_path / "drafter").mkdir()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("demo")))
    assert load_recipe(tmp_path) == load_recipe("demo")
    assert is_recipe(tmp_path)
    assert is_recipe("demo")
    assert is_recipe("missing.yaml")
    assert not is_recipe(tmp_path / "drafter")
    with pytest.raises(RecipeError, match=r"no recipe\.yaml in this folder"):
        load_recipe(tmp_path / "drafter")
    with pytest.raises(RecipeError, match="Did you mean 'demo'"):
        load_recipe("demoo")


def test_sections_can_be_made_of_overrides_alone():
    target, train = load_sections(["target", "train"], ["train.lr=1e-4", "train.max_steps=30"])
    assert (train.lr, train.max_steps) == (1e-4, 30)
    assert target == TargetSettings()
    with pytest.raises(RecipeError, match=r"seed: only these can be given here: target\.key=value, train\.key=value"):
        load_sections(["target", "train"], ["seed=3"])


def test_sections_alone_import_plugins_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "noted_plugin.py").write_text("")
    load_sections(["eval"], ["plugins=[noted_plugin]"])
    assert "noted_plugin" in sys.modules
    with pytest.raises(RecipeError, match="plugins: cannot import 'no_such_plugin'"):
        load_sections(["eval"], ["plugins=[no_such_plugin]"])


def test_a_plugin_that_fails_is_reported_like_other_problems(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "no_python.py").write_text("def (:")
    (tmp_path / "no_luck.py").write_text("1 / 0")
    found = "\n".join(problems(DEMO.read_text(), "plugins=[no_python, no_luck]"))
    assert "plugins: 'no_python' failed to import: SyntaxError" in found
    assert "plugins: 'no_luck' failed to import: ZeroDivisionError: division by zero" in found


def test_a_logger_that_is_not_installed_is_a_problem_of_the_recipe(monkeypatch):
    monkeypatch.setattr("drafttrain.training.settings.find_spec", lambda name: None)
    found = "\n".join(problems(DEMO.read_text(), "train.loggers=[csv, wandb, mlflow]"))
    assert "loggers: 'wandb' is not installed: pip install wandb" in found
    assert "loggers: 'mlflow' is not installed: pip install mlflow" in found
    assert "csv'" not in found


def test_plugins_register_kinds_before_they_are_looked_up(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_a_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from drafttrain.core.settings import setting\n"
        "from drafttrain.drafters import drafters\n"
        "@dataclass\n"
        "class Settings:\n"
        "    arms: int = setting(2, help='Arms.', ge=1)\n"
        "@drafters.register('hydra', Settings)\n"
        "class Hydra: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = ["plugins=[plugin_of_a_test]", "drafter={kind: hydra, arms: 9}"]
    try:
        recipe = load_recipe("demo", overrides)
        assert (recipe.drafter.kind, recipe.drafter.arms) == ("hydra", 9)
    finally:
        drafters._entries.pop("hydra", None)
        sys.modules.pop("plugin_of_a_test", None)
    found = problems(DEMO.read_text(encoding="utf-8"), "plugins=[no_such_module]")
    assert "plugins: cannot import 'no_such_module'" in found[0]


@contextlib.contextmanager
def plugin_with(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A plugin whose drafter's settings have this field; its override."""
    (tmp_path / "odd_plugin_of_a_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from drafttrain.drafters import drafters\n"
        "@dataclass\n"
        "class Settings:\n"
        f"    {field}\n"
        "@drafters.register('odd_hydra', Settings)\n"
        "class Hydra: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        yield "plugins=[odd_plugin_of_a_test]"
    finally:
        drafters._entries.pop("odd_hydra", None)
        sys.modules.pop("odd_plugin_of_a_test", None)


def test_a_plugin_with_a_type_that_no_structured_config_holds_is_refused(tmp_path, monkeypatch):
    with plugin_with("arms: set[str] = None", tmp_path, monkeypatch) as plugin:
        (found,) = problems(DEMO.read_text(), plugin, "drafter={kind: odd_hydra}")
        assert "Unexpected type annotation: set[str]" in found


@pytest.mark.parametrize(("given", "arms"), [("", None), (", arms: null", None), (", arms: 9", 9)])
def test_a_plugin_may_have_none_as_the_default_of_a_number(tmp_path, monkeypatch, given, arms):
    with plugin_with("arms: int = None", tmp_path, monkeypatch) as plugin:
        made = load_recipe("demo", [plugin, f"drafter={{kind: odd_hydra{given}}}"])
        assert made.drafter.arms == arms
        wrong = problems(DEMO.read_text(), plugin, "drafter={kind: odd_hydra, arms: many}")
        assert any("arms: must be a whole number" in one for one in wrong)


def test_every_field_of_every_section_says_what_it_means():
    def silent(settings: type, path: str) -> Iterator[str]:
        for name, field in fields_of(settings).items():
            if not field.help:
                yield f"{path}.{name}"
            if field.registry is not None:
                for kind in field.registry.names():
                    entry = field.registry.entry(kind).settings
                    if entry not in seen:
                        seen.add(entry)
                        yield from silent(entry, f"{path}.{name}({kind})")
            elif isinstance(field.hint, type) and hasattr(field.hint, "__dataclass_fields__"):
                yield from silent(field.hint, f"{path}.{name}")

    seen: set[type] = set()
    assert not list(silent(Recipe, "recipe"))


@pytest.mark.parametrize(
    "text", ["builtin:x", "a: b # c", "yes", "null", "1e-4", "", " x ", "two\nlines", "[a]", "ü", "- x", "'", '"', "@x"]
)
def test_any_text_survives_being_dumped(text):
    recipe = load_recipe("demo")
    recipe.target.model = text
    recipe.plugins = [text, text]
    again = yaml.safe_load(dump_recipe(recipe, comments=True))
    assert again["target"]["model"] == text
    assert again["plugins"] == [text, text]


def test_the_recipe_of_the_readme_is_valid():
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert read_recipe(text, source="README.md").name == "eagle3_qwen3_8b"
