"""Whatever a recipe or an override holds, it is loaded, or refused in sentences that name the line."""

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.config.bundled import bundled_recipes
from drafttrain.config.dump import dump_recipe
from drafttrain.config.load import load_recipe, read_recipe
from drafttrain.core.errors import RecipeError

MAX_SENTENCE = 700
"""Characters of a problem. The longest lists the keys of a section."""


@functools.cache
def texts() -> list[str]:
    """Return the bundled recipes as they are, and with every default written out, so that every key can be changed."""
    bundled = [recipe.path.read_text(encoding="utf-8") for recipe in bundled_recipes()]
    return bundled + [dump_recipe(read_recipe(text, source="bundled")) for text in bundled]


# fmt: off
VALUES = st.one_of(
    st.sampled_from(
        [
            *("null", "~", "", "true", "yes", "[]", "{}", "[[]]", "{a: 1}", "- 1", "=", "<<", "'", '"', "|", "> x", "%", "@x"),
            *("!!int x", "!!int", "!!int ''", "!!float abc", "!!float ''", "!!bool maybe", "!!null x", "!!seq x", "!!map [1]"),
            *("!!binary x", "!!set {a}", "!!omap [a: 1]", "!!timestamp x", "!!python/object/apply:os.system [ls]", "!x 1"),
            *("*b", "&a 1", "&a [*a]", "{<<: *b}", "2026-11-29", "9999-99-99", "190:20:30", "1:99", "0b12", "0o9", "0xfg", "1_0"),
            *(".nan", ".inf", "-.inf", "1e400", "1e-400", "-0.0", "0.1.2", "1" * 400, "9" * 5000, "-" + "9" * 30, "0x" + "f" * 400),
            *("a" * 2000, "[" * 200, "[" * 40 + "]" * 40, "{a: " * 40 + "1" + "}" * 40, "${oc.env:HOME}", "${a.b}", "$", "a: b: c"),
            *("\x00", "\x7f", "\x01", "\ud800", "\ufffe", "\u2028", '"\\x00"', '"\\ud800"', '"\\u0007"', '"\\xff\\n"', "'a\n\nb'"),
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
    st.text(max_size=20).map(json.dumps),
)
# fmt: on


@st.composite
def changed_recipes(draw: st.DrawFn) -> str:
    """Return a bundled recipe with one to four of its lines changed."""
    lines = draw(st.sampled_from(texts())).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at : at + 1] = draw(
            st.one_of(
                VALUES.map(lambda value, key=key, colon=colon: [f"{key}{colon or ':'} {value}"]),
                VALUES.map(lambda value, indent=indent: [f"{indent}{value}: 1"]),
                VALUES.map(lambda value, line=lines[at]: [line, value]),
                st.just([]),
                st.just([lines[at], lines[at]]),
                st.just(["  " + lines[at]]),
                st.just([f"{indent}x{lines[at].lstrip()}"]),
            )
        )
        lines = lines or [""]
    return "\n".join(lines)


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """Return an override of a key that is there, or nearly."""
    sections = [
        "name",
        "target.model",
        "drafter",
        "drafter.kind",
        "loss.kind",
        "data.sources.0.weight",
        "train.lr",
        "eval.also",
    ]
    key = draw(st.one_of(st.sampled_from(sections), st.text(max_size=12)))
    step = draw(st.sampled_from(["", "", ".0", ".²", ".99", ".x", "."]))
    return f"{key}{step}={draw(VALUES)}"


def loads_or_says_why(text: str, given_overrides: list[str]) -> None:
    """Load a recipe; what is loaded can be written and read again, what is not has one short sentence a problem."""
    problems: tuple[str, ...] = ()
    try:
        recipe = read_recipe(text, given_overrides, source="recipe.yaml")
    except RecipeError as error:
        problems = error.problems
        recipe = None
    assert all("\n" not in problem and len(problem) <= MAX_SENTENCE for problem in problems)
    assert "".join(problems).encode("utf-8") or recipe is not None
    if recipe is not None:
        assert read_recipe(dump_recipe(recipe), source="dumped") == recipe


CASES = given(changed_recipes(), st.lists(overrides(), max_size=2))


@pytest.mark.long
@settings(max_examples=200)
@CASES
def test_any_recipe_is_loaded_or_refused_in_sentences(text: str, given_overrides: list[str]) -> None:
    loads_or_says_why(text, given_overrides)


@pytest.mark.slow
@settings(max_examples=10_000)
@CASES
def test_any_of_ten_thousand_recipes_is_loaded_or_refused_in_sentences(text: str, given_overrides: list[str]) -> None:
    loads_or_says_why(text, given_overrides)


def test_recipes_that_ended_in_a_traceback_are_refused_in_sentences(shared_folder: Path) -> None:
    cases = [json.loads(line) for line in (shared_folder / "cases" / "recipe_crashes.jsonl").read_text().splitlines()]
    assert len(cases) == 190
    for case in cases:
        loads_or_says_why(case["recipe"], [])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("seed: !!int x", "line 2: 'x' cannot be read as int"),
        ("seed: !!float ''", "line 2: '' cannot be read as float"),
        ("seed: !!bool maybe", "line 2: 'maybe' cannot be read as bool"),
        ("seed: *b", "line 2: alias *b: write the value itself, a recipe has no anchors"),
        ("seed: " + "9" * 5000, f"line 2: '{'9' * 80}... (5,000 characters)' cannot be read as int of 5,000 characters"),
        ("seed: " + "9" * 30, f"line 2: seed: must be between -{2**63 - 1} and {2**63 - 1}, got {'9' * 30}"),
        ("train: {lr: 1" + "0" * 400 + "}", f"line 2: train.lr: must be between -{2**63 - 1} and {2**63 - 1}, got 1{'0' * 79}... (401 characters)"),
        ("seed: \x01", "line 2: not YAML: character U+0001 is not allowed"),
        ('seed: "\\ud800"', "line 2: character U+D800 is not allowed"),
        ("target: {model: ~nobody-of-this-name/x}", "line 2: target.model: must not start with the home folder of an unknown user, got '~nobody-of-this-name/x'"),
        ("target: {model: " + "z" * 5000 + "}", f"line 2: target.model: must be at most 4,096 characters, got '{'z' * 80}... (5,000 characters)'"),
        ('"\\0": 1', "line 2: character U+0000 is not allowed"),
        ("seed: " + "[" * 100 + "]" * 100, "line 2: values nested deeper than 32 levels"),
    ],
)  # fmt: skip
def test_each_fault_has_its_line(line: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(f"name: x\n{line}\ndrafter: {{kind: causal_lm}}\nloss: {{kind: ce}}\ndata: {{}}\n", source="r.yaml")
    assert problem in caught.value.problems


def test_a_refused_value_does_not_hide_other_problems() -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(
            "name: x\ntrain: {batch_size: *a, lr: -1}\nloss: {kind: *a}\ndata: *b\ntarget: {modle: y}\n", source="r"
        )
    found = "\n".join(caught.value.problems)
    for part in ("alias *a", "alias *b", "train.lr: must be", "target.modle: unknown key", "drafter: missing"):
        assert part in found


@pytest.mark.parametrize("name", ["a" * 300, "a\nb", " ", ".."])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="name: "):
        load_recipe("demo", [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have_is_no_recipe(path: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("# a comment\n" * 20_000)
    with pytest.raises(RecipeError, match="240,000 bytes: a recipe has at most 200,000"):
        load_recipe(path)
