"""drafttrain sweep: a recipe with every combination of some values, one run after the other, and one table of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.config.dump import differences, dump_recipe, plain
from drafttrain.config.grid import Arm, Grid, read_grid
from drafttrain.config.load import load_recipe
from drafttrain.config.made_by import made_by_recipes
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import duration, say
from drafttrain.core.errors import CheckpointError, DrafttrainError, GateError, Interrupted, RecipeError
from drafttrain.core.files import write_text
from drafttrain.distributed.world import launched, without_launcher
from drafttrain.eval.result import current_result
from drafttrain.pipeline.auto_types import resolve_auto_types
from drafttrain.pipeline.data import check_data_engines
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.preflight import problems_of
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.pipeline.serving import check_engines
from drafttrain.pipeline.shared_data import cached_together, clear_shared, share_data
from drafttrain.pipeline.sweep_report import show_sweep, write_sweep
from drafttrain.pipeline.sweep_result import DRAFTER, RATE, SweepResult, read_finished, sweep_result
from drafttrain.training.settings import TrainSettings

SAME_IN_ALL = (
    *("prompts", "validation_prompts", "prompt_tokens", "num_prompts"),
    *("max_new_tokens", "temperatures", "top_p", "top_k"),
)
"""Settings of the evaluation that must be equal in all arms: figures on other prompts or of another sampling cannot be compared."""

Fit = Callable[[Recipe, Path], None]
"""Runs all stages of a recipe in a folder."""


@dataclass(frozen=True)
class Run:
    """An arm with one seed."""

    arm: Arm
    recipe: Recipe
    folder: Path

    def __str__(self) -> str:
        settings = ", ".join(f"{axis}={value}" for axis, value in self.arm.settings.items())
        return f"{settings}, seed={self.recipe.seed}"


@dataclass(frozen=True)
class Sweep:
    """All runs of a grid, in its order."""

    grid: Grid
    recipe: str
    folder: Path
    runs: Sequence[Run]


def fit_in_new_process(recipe: Recipe, folder: Path) -> None:
    """Run `drafttrain fit` on a recipe in a process of its own, whose output is passed on.

    Raises:
        GateError: The drafter does not meet export.require; it is evaluated all the same.
        Interrupted: It was asked to stop.
        DrafttrainError: It failed; the text is the last message of its output.
    """
    file = folder.parent / "recipes" / f"{recipe.name}.yaml"
    write_text(file, dump_recipe(recipe))
    command = [sys.executable, "-m", "drafttrain", "fit", str(file), "--runs", str(folder.parent)]
    # A plugin that this process can import, the new one can import too.
    environment = without_launcher(os.environ) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, text=True, errors="backslashreplace", **pipes)
    assert process.stdout is not None
    message: list[str] = []
    try:
        for line in process.stdout:
            sys.stderr.write(line)
            # A message is one line; what belongs to it is indented.
            message = [*message, line] if line.startswith((" ", "\t")) else [line]
        code = process.wait()
    except BaseException:
        process.terminate()
        sys.stderr.writelines(process.stdout)
        process.wait()
        raise
    if code == Interrupted.exit_code:
        raise Interrupted(f"{recipe.name}: stopped: run the same command to continue")
    if code:
        text = "".join(message).strip() or "no message"
        kind = GateError if code == GateError.exit_code else DrafttrainError
        raise kind(text if code > 0 else f"killed by signal {-code}; the last message: {text}")


def sweep(
    recipe: str,
    words: Sequence[str],
    *,
    grid: Path | None = None,
    seeds: Sequence[int] = (),
    out: Path | None = None,
    runs: Path = Path("runs"),
    smoke: bool = False,
    fit: Fit = fit_in_new_process,
) -> SweepResult:
    """Run a recipe with every combination of the values; write sweep.json, sweep.md and sweep.png, and return their content.

    Args:
        words: `key=v1,v2` for an axis, `key=value` for all arms.
        grid: A file of axes whose values have names.
        seeds: Each arm runs with all of them; none: with the recipe's own.
        out: Folder of the runs. Default: `runs/<name>-sweep`.
        fit: Runs one recipe.

    Raises:
        RecipeError: Every problem of all arms, before anything runs.
        DrafttrainError: Runs failed. The others were finished, and the table is written.
    """
    planned = _planned(recipe, *read_grid(words, grid), seeds, out=out, runs=runs, smoke=smoke)
    with RunFolder(planned.folder).locked():
        clear_shared(planned.folder)
        failed = _run_all(planned, fit)
        result = _collected(planned, failed)
        write_sweep(planned.folder, result)
    show_sweep(result)
    say(f"table:   {planned.folder / 'sweep.md'}")
    if result.failed:
        lines = "\n  ".join(f"{name}: {error}" for name, error in result.failed.items())
        raise DrafttrainError(f"{len(result.failed)} of {len(planned.runs)} runs failed:\n  {lines}")
    return result


def _planned(
    name: str, grid: Grid, problems: Sequence[str], seeds: Sequence[int], *, out: Path | None, runs: Path, smoke: bool
) -> Sweep:
    """Return all runs of a grid, after every check.

    Args:
        problems: Those of the grid itself.

    Raises:
        RecipeError: Every problem once, with the arms that have it.
    """
    found = Problems(grid.arms())
    if launched():
        raise RecipeError("arguments", ["sweep starts the processes of each run itself: start it without a launcher"])
    recipes = dict[str, Recipe]()
    for arm in found.arms:
        try:
            recipes[arm.name] = load_recipe(name, arm.overrides, smoke=smoke)
        except RecipeError as error:
            found.note(arm, error.problems)
    first = next(iter(recipes.values()), None)
    if first is None or not grid.axes:
        raise RecipeError(name, [*problems, *found.lines()])
    folder = out or runs / f"{first.name}-sweep"
    planned = [
        Run(arm, replace(recipes[arm.name], name=run, seed=seed), folder / run)
        for arm in found.arms
        if arm.name in recipes
        for seed in seeds or [recipes[arm.name].seed]
        for run in [f"{arm.name}_seed-{seed}"]
    ]
    _check(planned, first, found)
    if lines := [*problems, *found.lines()]:
        raise RecipeError(name, lines)
    return Sweep(grid, first.name, folder, planned)


class Problems:
    """The problems of all arms, each once with the arms that have it."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.arms = arms
        self._arms_of = dict[str, list[str]]()

    def note(self, arm: Arm, problems: Iterable[str]) -> None:
        """Add problems of an arm."""
        for problem in problems:
            names = self._arms_of.setdefault(problem, [])
            if arm.name not in names:
                names.append(arm.name)

    def lines(self) -> list[str]:
        """Return a line for each problem."""
        return [
            f"{'all arms' if len(names) == len(self.arms) else ', '.join(names)}: {problem}"
            for problem, names in self._arms_of.items()
        ]


def _check(runs: Sequence[Run], first: Recipe, found: Problems) -> None:
    """Add the problems of runs: between each other, with their folders, and between the parts of each recipe."""
    quiet_libraries()
    checked = dict[str, list[str]]()
    equal = dict[str, Run]()
    for run in runs:
        found.note(run.arm, _not_comparable(run.recipe, first))
        earlier = equal.setdefault(json.dumps(plain(replace(run.recipe, name=""))), run)
        if earlier is not run:
            found.note(run.arm, [f"has the same settings as {earlier.arm.name}"])
        data = not RunFolder(run.folder).train_done.exists()
        # The checks do not read what is left out here, so arms that differ in that alone are checked once.
        parts = plain(replace(run.recipe, name="", seed=0, loss=first.loss, train=TrainSettings()))
        if (key := json.dumps([data, parts])) not in checked:
            checked[key] = [*problems_of(run.recipe, fetch=False, data=data), *_missing_engines(run)]
        found.note(run.arm, [*checked[key], *_other_training(run)])


def _missing_engines(run: Run) -> list[str]:
    """Return which engines that the recipe names are not installed, or cannot run its drafter."""
    recipe, kind = run.recipe, run.recipe.drafter.kind if run.recipe.drafter else None
    checks = (
        lambda: check_engines(recipe.export, kind, where=run.folder),
        lambda: check_data_engines(recipe, RunFolder(run.folder).data),
    )
    found: list[str] = []
    for check in checks:
        try:
            check()
        except RecipeError as error:
            found += error.problems
        except DrafttrainError as error:
            found.append(str(error))
    return found


def _not_comparable(recipe: Recipe, first: Recipe) -> Iterator[str]:
    """Yield why a recipe cannot be an arm beside the first one."""
    if recipe.online is not None:
        yield "online: a sweep trains on fixed data: leave the section out"
    if recipe.head is not None or recipe.target.model is None:
        yield "a sweep compares drafters on their target: the recipe needs the sections target and drafter"
    for key in SAME_IN_ALL:
        if getattr(recipe.eval, key) != getattr(first.eval, key):
            yield f"eval.{key}: differs from the first arm: figures on other prompts or texts cannot be compared"


def _other_training(run: Run) -> Iterator[str]:
    """Yield why the run's folder cannot be continued: it holds a training with other settings."""
    folder = RunFolder(run.folder)
    # Models that another recipe makes are in the folder under their paths; `fit` compares these.
    if folder.recipe.exists() and not list(made_by_recipes(run.recipe)):
        changes = folder.changes_of_training(resolve_auto_types(run.recipe, folder.stored_recipe()))
        if changes:
            yield f"{run.folder} holds a run of other settings ({'; '.join(changes)}): remove it, or give another --out"


def _is_finished(run: Run) -> bool:
    """Return whether a run's own files say that all its stages ended with these settings."""
    folder = RunFolder(run.folder)
    held = folder.stored_recipe() if folder.train_done.exists() else None
    if held is None or current_result(folder.eval) is None:
        return False
    wanted = resolve_auto_types(run.recipe, held)
    if differences(held, replace(wanted, train=replace(wanted.train, loggers=held.train.loggers))):
        return False
    try:
        # The card is written last.
        return (folder.exported(DRAFTER) / "README.md").exists()
    except CheckpointError:
        return False


def _run_all(planned: Sweep, fit: Fit) -> dict[str, str]:
    """Run what is not finished; return the error of each run that failed.

    Runs that read the same cache follow each other: a data folder holds one cache.
    """
    total, failed, took = len(planned.runs), dict[str, str](), list[float]()
    groups = dict[str, list[tuple[int, Run]]]()
    for number, run in enumerate(planned.runs, 1):
        if not _is_finished(run):
            groups.setdefault(cached_together(run.recipe), []).append((number, run))
    waiting = [one for group in groups.values() for one in group]
    if len(waiting) < total:
        say(f"{planned.folder}: {total - len(waiting)} of {total} runs are finished")
    for done, (number, run) in enumerate(waiting):
        left = f"; about {duration(sum(took) / len(took) * (len(waiting) - done))} left" if took else ""
        say(f"run {number} of {total}: {run}{left}")
        began = time.monotonic()
        try:
            share_data(run.recipe, run.folder, planned.folder)
            fit(run.recipe, run.folder)
        except Interrupted:
            raise
        except GateError as error:
            say(str(error))
        except Exception as error:  # any failure of one run: the others still run, and the end reports it
            failed[run.recipe.name] = str(error) or type(error).__name__
            say(f"{run.recipe.name} failed: {failed[run.recipe.name]}")
        took.append(time.monotonic() - began)
    return failed


def _collected(planned: Sweep, failed: Mapping[str, str]) -> SweepResult:
    """Return the figures of the arms whose runs all ended."""
    failed, finished = dict(failed), {}
    for arm in planned.grid.arms():
        own = [run for run in planned.runs if run.arm.name == arm.name]
        try:
            found = [read_finished(run.folder, seed=run.recipe.seed) for run in own if run.recipe.name not in failed]
        except DrafttrainError as error:
            failed[arm.name] = str(error)
            continue
        if len(found) == len(own):
            finished[arm.name] = found
    return sweep_result(
        finished,
        settings={arm.name: arm.settings for arm in planned.grid.arms()},
        axes={axis.name: [choice.name for choice in axis.choices] for axis in planned.grid.axes},
        rate=next((axis.name for axis in planned.grid.axes if axis.key == RATE), None),
        recipe=planned.recipe,
        failed=failed,
    )
