"""The figures at the top of the recipes of real models are those that `plan` counts, and the GPU that they name is large enough."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from drafttrain.commands.plan_header import COMMENT, FIGURES, WIDTH, figures, with_figures
from drafttrain.config.bundled import bundled_folder, bundled_recipes, find_recipe
from drafttrain.config.load import load_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.config.searched import is_searched
from drafttrain.core.gpus import RESERVED_BYTES, Gpu
from drafttrain.pipeline.plan import UTILIZATION, Plan, plan_of, sized_parts
from drafttrain.pipeline.search_plan import SearchPlan, search_plan_of
from drafttrain.training.step_cost import StepCost
from tests.cli.test_cli import call
from tests.marks import long

REAL = [one.name for one in bundled_recipes() if re.search(r"^  model: (known:|[\w-]+/)", one.path.read_text(), re.M)]
QUICK = "kangaroo_llama3.1_8b"
"""Two seconds of a core; others take up to a minute. `tests/training/test_step_cost.py` counts two more, with fewer blocks."""


def text_of(name: str) -> str:
    return find_recipe(name).read_text(encoding="utf-8")


def gpu_of(name: str) -> Gpu | None:
    return None if name.startswith("smollm2") else Gpu("h100")


def written(name: str) -> str:
    found = FIGURES.search(text_of(name))
    assert found is not None, f"{name}: no figures. Run drafttrain plan {name} --header"
    return found.group()


def of_sizes(recipe: Recipe, gpu: Gpu | None) -> Plan | SearchPlan:
    """Return a plan of what the sizes of a recipe decide, without a step."""
    if is_searched(recipe.drafter.kind):
        return search_plan_of(recipe, gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = sized_parts(recipe, device_type="cpu" if gpu is None else "cuda")
        gradients = sum(p.nbytes for p in made.drafter.parameters() if p.requires_grad)
        step = {"positions": 1, "executed": 1, "needed": 1, "kept": 0, "logits": 0, "peak": 0}
        cost = StepCost(**step, gradient_bytes=gradients, **made.sizes())
        return Plan(recipe, cost, gpu, UTILIZATION, records=None, cache_row=made.bytes_stored())


def decided(text: str) -> list[str]:
    """Return what the sizes decide in lines of figures: what each line is of, and the first five figures."""
    lines = text.splitlines()
    return [line if number < 6 else line[: 4 + WIDTH[0]] for number, line in enumerate(lines)]


@pytest.mark.parametrize("name", [name if place < 4 else long(name) for place, name in enumerate(REAL)])
def test_parameters_weights_steps_and_batches_in_a_header_are_the_recipes(name: str) -> None:
    assert decided(written(name)) == decided(figures(of_sizes(load_recipe(name), gpu_of(name))))


@pytest.mark.parametrize(
    "changed",
    [
        "drafter.num_heads=3",
        "train.optimizer=muon",
        "train.batch_size=16",
        "train.records_per_device=2",
        "train.max_steps=2000",
    ],
)
def test_control_a_changed_recipe_has_another_header(changed: str) -> None:
    name = "medusa_llama3.1_8b"
    assert decided(written(name)) != decided(figures(of_sizes(load_recipe(name, [changed]), gpu_of(name))))


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in REAL]
)
def test_every_figure_in_a_header_is_the_one_that_is_counted(name: str) -> None:
    recipe = load_recipe(name)
    planned = search_plan_of if is_searched(recipe.drafter.kind) else plan_of
    assert written(name) == figures(planned(recipe, gpu_of(name)))


def test_control_what_is_counted_depends_on_more_than_the_sizes() -> None:
    planned = plan_of(load_recipe(QUICK, ["train.loss_chunk_rows=4096"]), gpu_of(QUICK))
    assert decided(written(QUICK)) == decided(figures(planned))
    assert written(QUICK) != figures(planned)


@pytest.mark.parametrize("name", [name for name in REAL if gpu_of(name)])
def test_the_gpu_in_the_first_line_and_in_the_table_holds_the_peak(name: str) -> None:
    size = re.search(r"one GPU of (\d+) GB", text_of(name).splitlines()[0])
    peak = re.search(r"at the peak of a step +([\d.]+) GB", written(name))
    assert size is not None
    assert peak is not None
    assert float(peak[1]) + RESERVED_BYTES / 1e9 <= int(size[1])
    (row,) = [one for one in (bundled_folder() / "README.md").read_text().splitlines() if one.startswith(f"| `{name}`")]
    assert row.endswith(f"| one GPU of {size[1]} GB |")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("name: x\n", "{}name: x\n"),
        ("# Title.\n#\n#   a command\nname: x\n", "# Title.\n#\n#   a command\n#\n{}name: x\n"),
        ("# Computed by `drafttrain plan` for 9 t4:\n#   old  1\n#   x  2\n# More.\nname: x\n", "{}# More.\nname: x\n"),
    ],
)
def test_figures_replace_older_ones_and_nothing_else(before: str, after: str) -> None:
    plan = of_sizes(load_recipe("tiny_eagle"), None)
    assert with_figures(before, plan) == after.format(figures(plan))
    assert with_figures(with_figures(before, plan), plan) == with_figures(before, plan)


@pytest.mark.long
def test_the_command_writes_them_into_the_file_of_a_recipe(tmp_path: Path) -> None:
    text = text_of("tiny_medusa").replace("max_length: 512", "max_length: 64")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    call("plan", str(path), "--gpu", "l4", "--header")
    changed = path.read_text()
    assert "for 1 l4, not measured:\n#   parameters that are trained" in changed
    comment = COMMENT.match(text)
    assert comment is not None
    assert changed == with_figures(text, plan_of(load_recipe(path), Gpu("l4")))
    assert changed.endswith(text[comment.end() :])
    refused = call("plan", str(path), "train.batch_size=8", "--header", code=2)[1]
    assert "--header: needs the file of a recipe, without overrides" in " ".join(refused.split())


def test_a_training_that_does_not_fit_fails_with_what_to_change() -> None:
    large = ["target.model=meta-llama/Llama-3.1-8B-Instruct", "data.max_length=64", "data.cache=none"]
    out, err = call("plan", "tiny_medusa", "--gpu", "t4", *large, code=1)
    assert "memory of t4" in out
    assert re.search(r"does not fit: [\d.]+ GB more than t4 has", err)
    assert "h100" in err
