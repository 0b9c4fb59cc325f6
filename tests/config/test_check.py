"""The loader's rules, on settings of its own: every problem at once, each with its line and a suggestion."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from drafttrain.config.check import Checker
from drafttrain.config.load import load_recipe
from drafttrain.config.nodes import apply_override, read_yaml
from drafttrain.core.errors import RecipeError
from drafttrain.core.registry import Registry
from drafttrain.core.settings import setting

animals = Registry("animal", "drafttrain.heads")


@dataclass
class Cat:
    lives: int = setting(9, help="Lives left.", ge=1, le=9)
    name: str | None = setting(None, help="What it is called.")


@dataclass
class Herd:
    members: list[Any] = setting(help="Those in it.", registry=animals)
    weights: list[float] = setting([1.0], help="One a member.", gt=0)


@dataclass
class Ghost:
    pass


animals.register("cat", Cat)(type("CatComponent", (), {}))
animals.register("herd", Herd)(type("HerdComponent", (), {}))
animals.register("ghost", Ghost)(type("GhostComponent", (), {}))


@dataclass
class Inner:
    lr: float = setting(1e-3, help="Rate.", gt=0, lt=1)
    max_steps: int = setting(10, help="Steps.", ge=1)
    fast: bool = setting(False, help="Quick.")
    mode: Literal["cosine", "constant"] = setting("cosine", help="Schedule.")
    mix: dict[str, float] = setting({}, help="Shares.", ge=0)
    rate: float | list[float] = setting(1.0, help="One or several.", ge=0)

    def check(self) -> list[str]:
        return ["max_steps: too few for fast"] if self.fast and self.max_steps < 5 else []


@dataclass
class Root:
    name: str = setting(help="Name.")
    inner: Inner = field(default_factory=Inner)
    pet: Any = setting({"kind": "cat", "lives": 7}, help="An animal.", registry=animals)
    pets: list[Any] = setting([], help="Animals.", registry=animals)
    guest: Any = setting(None, help="Or none.", registry=animals)


def load(text: str, *overrides: str) -> Root:
    node, problems = read_yaml(text, source="test.yaml")
    for override in overrides:
        problems += apply_override(node, override)
    checker = Checker()
    made = checker.settings(Root, node)
    problems += checker.problems
    if problems:
        raise RecipeError("test.yaml", [str(problem) for problem in sorted(problems, key=lambda p: p.order)])
    return made


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return list(caught.value.problems)


def test_what_the_recipe_leaves_out_has_its_default():
    root = load("name: x")
    assert root == Root(name="x", inner=Inner(), pet=Cat(lives=7))
    assert root.pet.kind == "cat"


def test_components_nest_and_stand_in_lists():
    root = load("name: x\npet: {kind: herd, members: [{kind: cat, lives: 2}, {kind: ghost}]}\npets: [{kind: ghost}]")
    assert root.pet == Herd(members=[Cat(lives=2), Ghost()])
    assert root.pets[0].kind == "ghost"


def test_a_component_without_a_kind_changes_the_default_one():
    root = load("name: x\npet: {name: Tom}")
    assert root.pet == Cat(lives=7, name="Tom")
    assert load("name: x", "pet.lives=3").pet == Cat(lives=3)
    assert load("name: x\npet: {kind: cat}").pet == Cat(lives=7)


def test_every_problem_is_told_at_once_with_its_line():
    text = """\
name: 3
iner: {}
inner:
  lr: 2
  max_step: 5
  mode: cosin
  fast: 1
pet:
  kind: cta
pets:
  - kind: cat
    lives: 12
  - lives: 3
"""
    assert problems(text) == [
        'line 1: name: must be text, got 3: write "3"',
        "line 2: iner: unknown section. Did you mean 'inner'?",
        "line 4: inner.lr: must be > 0 and < 1, got 2",
        "line 5: inner.max_step: unknown key. Did you mean 'max_steps'?",
        "line 6: inner.mode: must be one of cosine, constant, got 'cosin'. Did you mean 'cosine'?",
        "line 7: inner.fast: must be true or false, got 1",
        "line 9: pet.kind: unknown animal 'cta'. Did you mean 'cat'? Available: cat, ghost, herd",
        "line 12: pets.0.lives: must be >= 1 and <= 9, got 12",
        "line 13: pets.1: kind is missing: which animal? Available: cat, ghost, herd",
    ]


def test_a_key_like_no_other_is_answered_with_the_keys_there_are():
    assert problems("name: x\npet: {kind: cat, zzz: 1}") == ["line 2: pet.zzz: unknown key. Keys here: lives, name"]


def test_what_is_missing_is_told_with_its_meaning():
    assert problems("inner: {lr: 0.1}") == ["line 1: name: missing. Name."]
    assert problems("name: x\npet:\n  kind: herd") == ["line 2: pet.members: missing. Those in it."]


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001"])
def test_a_float_may_be_written_in_any_way(written):
    assert load(f"name: x\ninner: {{lr: {written}}}").inner.lr == 1e-4


def test_a_whole_number_is_a_float_and_true_is_no_number():
    assert isinstance(load("name: x\ninner: {rate: 2}").inner.rate, float)
    assert problems("name: x\ninner: {max_steps: true, lr: false}") == [
        "line 2: inner.lr: must be a number, got false",
        "line 2: inner.max_steps: must be a whole number, got true",
    ]
    assert problems("name: x\ninner: {lr: .nan}") == ["line 2: inner.lr: must be a finite number, got .nan"]
    assert problems("name: x\ninner: {max_steps: 1.5}") == ["line 2: inner.max_steps: must be a whole number, got 1.5"]


def test_a_union_takes_either_form_and_keeps_the_range():
    assert load("name: x\ninner: {rate: [1, 2.5]}").inner.rate == [1.0, 2.5]
    assert problems("name: x\ninner: {rate: [1, -2]}") == ["line 2: inner.rate.1: must be >= 0, got -2"]
    assert problems("name: x\ninner: {rate: fast}") == [
        "line 2: inner.rate: must be a number or [a number, ...], got 'fast'"
    ]


def test_names_with_values_are_checked_one_by_one():
    assert load("name: x\ninner: {mix: {code: 0.9, chat: 1e-1}}").inner.mix == {"code": 0.9, "chat": 0.1}
    assert problems("name: x\ninner:\n  mix:\n    code: much") == [
        "line 4: inner.mix.code: must be a number, got 'much'"
    ]


def test_null_is_taken_where_none_is_allowed_and_nowhere_else():
    assert load("name: x\npet: {kind: cat, name: null}\nguest: null").guest is None
    assert problems("name: x\ninner: {lr: null}\npet: null") == [
        "line 2: inner.lr: must be a number, got null",
        "line 3: pet: must be a mapping with its kind, such as {kind: cat}, got null",
    ]


def test_a_scalar_where_a_section_belongs_is_refused():
    assert problems("name: x\ninner: 3\npets: cat") == [
        "line 2: inner: must be a section: keys and values, indented below it, got 3",
        "line 3: pets: must be a list of mappings, each with its kind, got 'cat'",
    ]


def test_checks_across_fields_are_told_at_the_line_of_their_key():
    assert problems("name: x\ninner:\n  fast: true\n  max_steps: 2") == ["line 4: inner.max_steps: too few for fast"]


def test_keys_twice_anchors_aliases_and_merge_keys_are_refused():
    text = "name: x\nname: y\ninner: &here\n  lr: 0.1\npet: {kind: cat, name: *here}\nguest:\n  <<: {kind: cat}\n"
    found = problems(text)
    assert "line 2: name: given twice, first in line 1" in found
    assert "line 3: anchor &here: write the value itself, a recipe has no anchors" in found
    assert "line 5: alias *here: write the value itself, a recipe has no anchors" in found
    assert "line 7: merge key <<: write the keys themselves, a recipe has no anchors" in found


def test_an_alias_of_itself_ends():
    assert any("alias *a" in problem for problem in problems("name: x\npets: &a [*a]"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\ninner: {lr: 1\npet: 3\n", "line "),
        ("name: x\n\tinner: 3", "line 2"),
        ("a: b: c", "line 1"),
        ("- [", "line "),
    ],
)
def test_text_that_is_no_yaml_is_told_with_its_line(text, line):
    (found,) = problems(text)
    assert found.startswith(line)
    assert "not YAML" in found


def test_python_tags_are_refused():
    (found,) = problems("name: !!python/object/apply:os.system ['true']")
    assert found == "line 1: tag tag:yaml.org,2002:python/object/apply:os.system: only plain values are allowed"


def test_an_empty_recipe_says_so():
    assert "line 1: the recipe is empty" in problems("# nothing\n")


def test_references_are_refused():
    assert problems("name: ${oc.env:HOME}") == [
        "line 1: name: references such as ${oc.env:HOME} are not resolved: write the value itself"
    ]


def test_overrides_are_applied_before_anything_is_checked():
    text = "name: x\ninner: {lr: 5}\npets: [{kind: cat}, {kind: cat}]"
    root = load(text, "inner.lr=1e-4", "pets.1.lives=2", "inner.mix={code: 1}", "inner.mode=constant", "name=007")
    assert (root.inner.lr, root.inner.mode, root.inner.mix) == (1e-4, "constant", {"code": 1.0})
    assert [pet.lives for pet in root.pets] == [9, 2]
    assert root.name == "007"


def test_an_override_may_open_a_section_and_take_any_text():
    assert load("name: x", "inner.max_steps=3").inner.max_steps == 3
    assert load("name: x", "pet.name=@odd: %text").pet.name == "@odd: %text"
    assert load("name: x\npet: {kind: cat, name: Tom}", "pet.name=null").pet.name is None


def test_problems_of_overrides_name_them():
    found = problems("name: x\npets: [{kind: cat}]", "inner.lr=-1", "iner.lr=1", "pets.3.lives=1", "name.x=1", "lr")
    assert set(found) == {
        "override inner.lr=-1: inner.lr: must be > 0 and < 1, got -1",
        "override iner.lr=1: iner: unknown section. Did you mean 'inner'?",
        "override pets.3.lives=1: pets has items 0..0, got '3'",
        "override name.x=1: name is a single value, it has no 'x'",
        "override lr: an override has the form section.key=value",
    }


def test_a_tree_of_a_drafter_that_drafts_chains_is_refused_before_anything_is_trained():
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            "tiny_kangaroo",
            ["eval.length={kind: rsd_s}", "eval.also=[{kind: tree}, {kind: fixed, num_draft_tokens: 3}]"],
        )
    text = "is a tree, and drafter.kind kangaroo drafts chains only: use kind fixed or confidence"
    assert f"eval.length: rsd_s {text}" in str(caught.value)
    assert f"eval.also: tree {text}" in str(caught.value)
    assert "fixed is" not in str(caught.value)
    assert load_recipe("tiny_medusa", ["eval.length={kind: rsd_s}"]).eval.length.depth == 5


def test_formats_and_engines_that_cannot_take_the_kind_are_refused_before_anything_is_trained():
    def problems(*overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe("tiny_kangaroo", list(overrides))
        return str(caught.value)

    found = problems("export.to=[hf, vllm]", "export.verify=[vllm]")
    assert "export.to: vllm does not support drafter.kind kangaroo" in found
    assert "export.verify: vllm does not support drafter.kind kangaroo" in found
    assert "hf has no place" not in found
    unknown = problems("export.to=[vlm]", "export.verify=[sglang]")
    assert "to: unknown export format 'vlm'. Did you mean 'vllm'?" in unknown
    assert "verify: unknown serving engine 'sglang'" in unknown
    assert load_recipe("tiny_medusa", ["export.to=[vllm]", "export.verify=[vllm]"]).export.verify == ["vllm"]
    with pytest.raises(RecipeError, match="no serving engine loads a head"):
        load_recipe("tiny_acceptance", ["export.to=[vllm]"])


def test_the_gain_over_a_start_that_is_not_evaluated_cannot_be_required():
    with pytest.raises(RecipeError, match=r"export.require.gain_over_start: the start is not evaluated"):
        load_recipe("tiny_medusa", ["eval.start=false"])
    assert not load_recipe("tiny_eagle3", ["eval.start=false"]).eval.start
