"""The grid of a sweep: how words and a file become arms, and every problem of both at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafttrain.config.grid import Grid, read_grid, split_values


def grid_of(*words: str, file: Path | None = None) -> Grid:
    grid, problems = read_grid(words, file)
    assert not problems
    return grid


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[0.9,0.95]", ["[0.9,0.95]"]),
        ("[0.9,0.95],[0.9,0.999]", ["[0.9,0.95]", "[0.9,0.999]"]),
        ("{kind: sum, terms: [{loss: {kind: ce}, weight: 1}]},{kind: ce}", None),
        ('"a, b",c', ['"a, b"', "c"]),
        ("'[',']'", ["'['", "']'"]),
        ("it's,its", ["it's", "its"]),
        ("a, b", ["a", "b"]),
        ("a,,b,", ["a", "", "b", ""]),
        ("builtin:drafter,known:smollm2", ["builtin:drafter", "known:smollm2"]),
    ],
)
def test_only_commas_outside_brackets_and_quotes_split(text, values):
    values = values or ["{kind: sum, terms: [{loss: {kind: ce}, weight: 1}]}", "{kind: ce}"]
    assert split_values(text) == values


def test_every_combination_is_an_arm_once_and_the_last_axis_is_fastest():
    grid = grid_of("train.lr=1e-4,3e-4", "train.max_steps=12", "loss.kind=tvd,tvdpp")
    assert grid.fixed == ("train.max_steps=12",)
    assert [arm.name for arm in grid.arms()] == [
        "lr-1e-4_loss-tvd",
        "lr-1e-4_loss-tvdpp",
        "lr-3e-4_loss-tvd",
        "lr-3e-4_loss-tvdpp",
    ]
    assert grid.arms()[1].overrides == ("train.max_steps=12", "train.lr=1e-4", "loss.kind=tvdpp")
    assert grid.arms()[1].settings == {"lr": "1e-4", "loss": "tvdpp"}


def test_names_of_arms_do_not_change_when_values_are_added():
    few, more = (
        grid_of("data.sources=[{kind: text, path: a}],[]"),
        grid_of("data.sources=[1],[],[{kind: text, path: a}]"),
    )
    assert {arm.name for arm in few.arms()} < {arm.name for arm in more.arms()}
    # All of it may be part of a path, however long the values are.
    long = grid_of(*(f"section.key{i}={'x' * 50},{'y' * 50}" for i in range(6))).arms()
    assert len({arm.name for arm in long}) == 64
    assert all(len(arm.name) < 150 and "/" not in arm.name for arm in [*long, *more.arms()])


def test_keys_with_the_same_end_are_told_apart():
    grid = grid_of("train.lr=1,2", "train.pretrain.lr=1,2", "loss.scope=a,b", "loss.kind=tvd,ce")
    assert [axis.name for axis in grid.axes] == ["train.lr", "pretrain.lr", "scope", "loss"]


def test_a_file_names_its_values_and_multiplies_with_the_words(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "texts:\n"
        "  fixed: {data.sources: [{kind: text, path: 'a, b.txt'}], data.generate: null}\n"
        "  own: {data.sources: [{kind: generated}]}\n"
    )
    first, *others = grid_of("train.lr=1,2", file=file).arms()
    assert [first.name, *(arm.name for arm in others)] == [
        "texts-fixed_lr-1",
        "texts-fixed_lr-2",
        "texts-own_lr-1",
        "texts-own_lr-2",
    ]
    assert first.overrides == (
        'data.sources=[{"kind": "text", "path": "a, b.txt"}]',
        "data.generate=null",
        "train.lr=1",
    )


def test_all_problems_are_reported_at_once_and_the_rest_of_the_grid_stays():
    grid, problems = read_grid(
        ["train.lr=1e-4,,1e-4,3e-4", "seed=0,1", "loss.scope=[a", "nothing", "eval.top_p=", "train.lr=1", "name=a,b"]
    )
    assert problems == [
        'train.lr=1e-4,,1e-4,3e-4: empty value: remove the comma, or write "" for an empty text',
        "train.lr=1e-4,,1e-4,3e-4: 1e-4 is given 2 times",
        "seed=0,1: seed cannot be an axis: give the seeds with --seeds 0,1",
        "loss.scope=[a: brackets do not match",
        "nothing: a word has the form section.key=v1,v2",
        'eval.top_p=: empty value: remove the comma, or write "" for an empty text',
        "train.lr: given twice; give all values at once",
        "name=a,b: name cannot be an axis: each arm gets a name of its own",
    ]
    assert read_grid(["train.lr=1"])[1] == [
        "no axis: give a key with two or more values, such as train.lr=1e-4,3e-4, or --grid FILE"
    ]
    assert not grid.axes


def test_a_grid_file_of_another_form_is_refused_with_its_lines(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("lr: [1, 2]\ntexts:\n  fixed: text\n  own:\n    seed: 3\n")
    form = "a grid file has the form axis: {name: {section.key: value}}"
    assert read_grid([], file)[1] == [
        f"{file}: line 1: lr: {form}",
        f"{file}: line 3: texts: fixed: {form}",
        f"{file}: line 5: seed cannot be in a grid: give the seeds with --seeds 0,1",
    ]
    assert read_grid([], tmp_path / "none.yaml")[1] == [
        f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"
    ]
