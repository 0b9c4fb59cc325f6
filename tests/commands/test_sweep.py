"""A sweep: data is made once, finished runs are skipped, a run that fails stops no other, figures are paired."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from drafttrain.checkpoint import About
from drafttrain.commands.sweep import fit_in_new_process, sweep
from drafttrain.config.dump import dump_recipe
from drafttrain.config.load import load_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.errors import DrafttrainError, GateError, Interrupted, RecipeError
from drafttrain.core.files import write_json, write_text
from drafttrain.eval.figures import compare
from drafttrain.eval.metrics import PromptCounts
from drafttrain.eval.result import LOSSY, AtTemperature, PlainFigures, Result, read_result
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.pipeline.auto_types import resolve_auto_types
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.shared_data import cached_together, share_data
from drafttrain.pipeline.sweep_report import markdown, write_sweep
from drafttrain.pipeline.sweep_result import Finished, SweepResult, read_finished, sweep_result
from tests.eval.results import figures, result

GRID = ["train.lr=1e-3,3e-3", "loss.kind=tvd,tvdpp", "train.max_steps=20"]
PROMPTS = "abcdefgh"


def counts(seed: int, arm: int, *, prompts: str = PROMPTS) -> list[PromptCounts]:
    """Return counts that differ by prompt, seed and arm."""
    made = []
    for place, id in enumerate(prompts):
        tokens, rounds = 20 + 7 * (ord(id) % 5), 9 + (ord(id) + seed * place) % 4 - (arm + place) % 3
        made.append(PromptCounts(id, "all", tokens, rounds, 5 * rounds, tokens - rounds, (rounds // 2,), (rounds,)))
    return made


def evaluation(prompts: list[PromptCounts]) -> Result:
    made = figures(prompts=prompts, block_efficiency=ratio_interval([1], [1]))
    part = AtTemperature(0.0, PlainFigures(1, 1, 1.0), {"drafter": made}, {})
    return replace(result(), temperatures=[part])


class Finisher:
    """Leaves the files of a finished run, in place of a training; runs in `failing` fail."""

    def __init__(self, *, failing: dict[str, BaseException] | None = None) -> None:
        self.failing = failing or {}
        self.ran: list[str] = []

    def __call__(self, recipe: Recipe, folder: Path) -> None:
        self.ran.append(recipe.name)
        if recipe.name in self.failing:
            raise self.failing[recipe.name]
        run = RunFolder(folder)
        write_text(run.recipe, dump_recipe(resolve_auto_types(recipe, None)))
        write_json(run.train_done, {"drafter": "best", "best_step": 10, "last_step": 20})
        rows = [
            "step,tokens,seconds,validation_block_efficiency,validation_block_efficiency_low,validation_block_efficiency_high",
            "0,0,0,1.5,1.4,1.7",
            f"10,500,2,{2 + recipe.train.lr},{1.75 - recipe.seed / 2},{2.25 + recipe.seed / 2}",
            "15,700,3,,,",
            "20,1000,4,1.75,nan,nan",
        ]
        write_text(run.train / "metrics.csv", "\n".join(rows) + "\n")
        write_json(run.inputs, {"data.sources.0": {"path": "text.txt", "digest": "1"}})
        evaluation(counts(recipe.seed, int(recipe.train.lr * 1000))).write(run.eval)
        write_text(run.drafter / "README.md", "a card")


def swept(folder: Path, fit: Callable[[Recipe, Path], None], *words: str, seeds: tuple[int, ...] = (0, 1)):
    return sweep("demo", words or GRID, out=folder, seeds=seeds, fit=fit)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResult, Path]:
    """A sweep whose runs all ended, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    return swept(folder, Finisher()), folder


def test_the_paired_difference_is_the_evaluators_on_counts_summed_over_seeds(whole):
    found, folder = whole
    tvd = {"1e-3": "lr-1e-3_loss-tvd", "3e-3": "lr-3e-3_loss-tvd"}
    own = {
        rate: [read_result(folder / f"{arm}_seed-{seed}" / "eval.json").temperatures[0] for seed in (0, 1)]
        for rate, arm in tvd.items()
    }
    by_seed = {rate: [part.drafters["drafter"].prompts for part in parts] for rate, parts in own.items()}
    summed = {
        rate: [
            (sum(one.num_tokens for one in same), sum(one.num_rounds for one in same))
            for same in zip(*prompts, strict=True)
        ]
        for rate, prompts in by_seed.items()
    }
    by_hand = ratio_difference(*(list(zip(*summed[rate], strict=True)) for rate in ("3e-3", "1e-3")))
    first, _, second, _ = (arm.temperatures[0] for arm in found.arms)
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.block_efficiency == by_hand.interval()
    assert by_hand.low < by_hand.value < by_hand.high
    # The control: one seed alone, or the arms the other way round, give another interval.
    assert compare(by_seed["3e-3"][0], by_seed["1e-3"][0]).block_efficiency != by_hand.interval()
    assert ratio_difference(*(list(zip(*summed[rate], strict=True)) for rate in tvd)).interval() != by_hand.interval()
    tokens, rounds = (sum(pair[i] for pair in summed["1e-3"]) for i in (0, 1))
    assert first.block_efficiency.value == tokens / rounds


def test_table_json_and_picture_name_every_arm(whole):
    found, folder = whole
    page = (folder / "sweep.md").read_text()
    assert [line.split(" | ")[:3] for line in page.splitlines() if line.startswith("| 1e-3")] == [
        ["| 1e-3", "tvd", "1,000"],
        ["| 1e-3", "tvdpp", "1,000"],
    ]
    assert "**" in page
    assert "loss=tvd, lr=3e-3 is best and the highest of the grid" in page
    assert "loss=tvdpp, lr=3e-3 is best and the highest of the grid" in page
    assert "highest block efficiency on the validation prompts: lr-3e-3" in page
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "sweep.json").read_text())
    assert [arm["name"] for arm in content["arms"]] == [arm.name for arm in found.arms]
    # The bounds of the seeds are 0.25 and 0.75 around 2.
    bounds = {"low": pytest.approx(1.5), "high": pytest.approx(2.5)}
    point = {"step": 10, "tokens": 500.0, "seconds": 2.0, "block_efficiency": pytest.approx(2.001)} | bounds
    assert content["arms"][0]["curve"][1] == point
    assert content["arms"][0]["curve"][2]["low"] is None
    assert content["arms"][0]["temperatures"][0]["prompts"][0]["id"] == "a"


def test_a_lossy_arm_is_marked_and_never_the_best(tmp_path):
    def finished(name: str, **changes: object) -> Finished:
        Finisher()(load_recipe("demo", ["train.lr=1e-3"]), tmp_path / name)
        path = RunFolder(tmp_path / name).eval
        replace(read_result(path), **changes).write(path)
        return read_finished(tmp_path / name, seed=0)

    runs = {"exact": [finished("exact")], "lossy": [finished("lossy", exactness=LOSSY)]}
    settings = {name: {"rule": name} for name in runs}
    page = markdown(
        sweep_result(runs, settings=settings, axes={"rule": list(runs)}, rate=None, recipe="demo", failed={})
    )
    exact, lossy = (line for line in page.splitlines() if line.startswith(("| exact", "| lossy")))
    assert "**" in exact
    assert "(lossy)" in lossy
    assert "**" not in lossy


def test_the_validated_figure_is_that_of_the_step_that_was_exported(tmp_path):
    """Which `export.step` chooses; here the best one is step 10."""
    Finisher()(load_recipe("demo", ["train.lr=1e-3"]), tmp_path)
    path = RunFolder(tmp_path).eval
    made = read_result(path)
    about = About("causal_lm", "builtin:target", "", "", 4096, trained_steps=20)
    replace(made, drafters={"drafter": replace(made.drafters["drafter"], about=about)}).write(path)
    assert read_finished(tmp_path, seed=0).run.validated == 1.75


def test_a_curve_is_drawn_with_its_intervals_and_without_them_where_a_run_has_none(tmp_path):
    def drawn(name: str, columns: int) -> bytes:
        folder = tmp_path / name
        Finisher()(load_recipe("demo", ["train.lr=1e-3"]), folder / "run")
        path = folder / "run" / "metrics.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text("".join(",".join(row[:columns]) + "\n" for row in rows))
        runs = {"arm": [read_finished(folder / "run", seed=0)]}
        found = sweep_result(runs, settings={"arm": {"a": "1"}}, axes={"a": ["1"]}, rate=None, recipe="demo", failed={})
        assert [math.isnan(point.low) for point in found.arms[0].curve] == [columns < 6, columns < 6, True]
        write_sweep(folder, found)
        return (folder / "sweep.png").read_bytes()

    older = drawn("older", 4)
    assert older == drawn("same", 4)
    assert older != drawn("now", 6)


def test_the_interval_of_a_point_over_seeds_is_no_narrower_than_that_of_summed_counts(tmp_path):
    """It is as wide where the prompts of all seeds err alike, and wider where they do not."""
    tokens = np.full(24, 60.0)
    first, second = (np.random.default_rng(seed).uniform(20, 40, 24) for seed in (0, 1))

    def reach(*rounds_of_seeds: np.ndarray) -> tuple[float, float]:
        """Return half the width of the point's interval, and of that of the counts summed over the seeds."""
        finished = []
        for seed, rounds in enumerate(rounds_of_seeds):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            Finisher()(load_recipe("demo", ["train.lr=1e-3"]), folder)
            own = ratio_interval(tokens, rounds)
            head = (folder / "metrics.csv").read_text().splitlines()[0]
            (folder / "metrics.csv").write_text(f"{head}\n20,1000,4,{own.value!r},{own.low!r},{own.high!r}\n")
            finished.append(read_finished(folder, seed=seed))
        runs = {"arm": finished}
        found = sweep_result(runs, settings={"arm": {"a": "1"}}, axes={"a": ["1"]}, rate=None, recipe="demo", failed={})
        (point,) = found.arms[0].curve
        summed = ratio_interval(len(rounds_of_seeds) * tokens, sum(rounds_of_seeds))
        assert point.block_efficiency == pytest.approx(summed.value)
        return (point.high - point.low) / 2, (summed.high - summed.low) / 2

    alike, by_counts = reach(first, first)
    assert alike == pytest.approx(by_counts)
    apart, by_counts = reach(first, second)
    assert apart > 1.2 * by_counts


def finished_runs(folder: Path, rates: dict[str, float]) -> dict[str, list[Finished]]:
    """Return finished runs by their learning rate, with these validated figures."""
    runs = {}
    for rate, figure in rates.items():
        Finisher()(load_recipe("demo", [f"train.lr={rate}"]), folder / rate)
        path = folder / rate / "metrics.csv"
        path.write_text(path.read_text().replace(str(2 + float(rate)), str(figure)))
        runs[rate] = [read_finished(folder / rate, seed=0)]
    return runs


@pytest.mark.parametrize(
    ("best", "figure", "edge"),
    [("1e-3", 2.4, "lowest"), ("2e-3", 2.4, None), ("3e-3", 2.4, "highest"), ("3e-3", 2.3, None)],
)
def test_one_best_rate_at_the_edge_of_the_grid_is_reported(tmp_path, best, figure, edge):
    rates = {"1e-3": 2.1, "3e-3": 2.2, "2e-3": 2.3} | {best: figure}
    found = sweep_result(
        finished_runs(tmp_path, rates),
        settings={rate: {"lr": rate} for rate in rates},
        axes={"lr": list(rates)},
        rate="lr",
        recipe="demo",
        failed={},
    )
    notes = [note for note in found.notes if "of the grid" in note]
    assert notes == ([f"lr={best} is best and the {edge} of the grid: a better one may lie beyond it"] if edge else [])


@pytest.mark.long
def test_finished_runs_are_skipped_and_a_changed_grid_adds_arms(tmp_path):
    first = Finisher(failing={"lr-1e-3_loss-tvdpp_seed-0": Interrupted("stopped")})
    with pytest.raises(Interrupted):
        swept(tmp_path, first, seeds=(0,))
    assert first.ran == ["lr-1e-3_loss-tvd_seed-0", "lr-1e-3_loss-tvdpp_seed-0"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "lr-1e-3_loss-tvd_seed-0").iterdir()}
    second = Finisher()
    swept(tmp_path, second, seeds=(0,))
    assert second.ran == ["lr-1e-3_loss-tvdpp_seed-0", "lr-3e-3_loss-tvd_seed-0", "lr-3e-3_loss-tvdpp_seed-0"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "lr-1e-3_loss-tvd_seed-0").iterdir()}
    third = Finisher()
    found = swept(tmp_path, third, "train.lr=1e-3,1e-2", *GRID[1:], seeds=(0,))
    assert third.ran == ["lr-1e-2_loss-tvd_seed-0", "lr-1e-2_loss-tvdpp_seed-0"]
    assert [arm.name for arm in found.arms] == [
        "lr-1e-3_loss-tvd",
        "lr-1e-3_loss-tvdpp",
        "lr-1e-2_loss-tvd",
        "lr-1e-2_loss-tvdpp",
    ]
    # Evaluated differently, they are not finished: `fit` evaluates them again.
    fourth = Finisher()
    swept(tmp_path, fourth, *GRID, "eval.max_new_tokens=32", seeds=(0,))
    assert len(fourth.ran) == 4


def test_a_run_that_fails_is_reported_at_the_end_and_stops_no_other(tmp_path):
    failing = {
        "lr-1e-3_loss-tvd_seed-1": DrafttrainError("the loss is nan at step 7"),
        "lr-3e-3_loss-tvd_seed-0": ValueError("a bug"),
    }
    fit = Finisher(failing=failing)
    with pytest.raises(DrafttrainError, match="2 of 8 runs failed") as raised:
        swept(tmp_path, fit)
    assert "lr-1e-3_loss-tvd_seed-1: the loss is nan at step 7" in str(raised.value)
    assert raised.value.exit_code == 1
    assert len(fit.ran) == 8
    content = json.loads((tmp_path / "sweep.json").read_text())
    # An arm without one of its seeds has no figures: its others would be compared with more seeds.
    assert [arm["name"] for arm in content["arms"]] == ["lr-1e-3_loss-tvdpp", "lr-3e-3_loss-tvdpp"]
    assert content["baseline"] == "lr-1e-3_loss-tvdpp"
    assert content["failed"]["lr-3e-3_loss-tvd_seed-0"] == "a bug"
    assert "FAILED: lr-3e-3" in (tmp_path / "sweep.md").read_text()


def test_an_arm_below_the_gate_is_measured_and_marked(tmp_path):
    class BelowGate(Finisher):
        def __call__(self, recipe: Recipe, folder: Path) -> None:
            super().__call__(recipe, folder)
            (folder / "drafter").rename(folder / "drafter.rejected")
            raise GateError("gate not met")

    found = swept(tmp_path, BelowGate(), "train.lr=1e-3,3e-3", seeds=(0,))
    assert len(found.arms) == 2
    assert "lr-1e-3: below export.require (seed 0)" in found.notes
    again = Finisher()
    swept(tmp_path, again, "train.lr=1e-3,3e-3", seeds=(0,))
    assert not again.ran


def test_only_prompts_that_all_arms_decoded_count(tmp_path):
    finished = {}
    for place, (arm, prompts) in enumerate({"one": "abcdefgh", "two": "cdefghij"}.items()):
        folder = tmp_path / arm
        Finisher()(replace(load_recipe("demo"), name=arm), folder)
        evaluation(counts(0, place, prompts=prompts)).write(folder / "eval.json")
        finished[arm] = [read_finished(folder, seed=0)]
    write_json(tmp_path / "two" / "inputs.json", {"data.sources.0": {"path": "text.txt", "digest": "2"}})
    finished["two"] = [read_finished(tmp_path / "two", seed=0)]
    found = sweep_result(finished, settings={"one": {}, "two": {}}, axes={}, rate=None, recipe="demo", failed={})
    assert (found.num_prompts, found.num_prompts_of_some) == (6, 4)
    assert [one.id for one in found.arms[1].temperatures[0].prompts] == list("cdefgh")
    by_hand = compare(counts(0, 1, prompts="cdefghij")[:6], counts(0, 0, prompts="abcdefgh")[2:])
    assert found.arms[1].temperatures[0].difference == by_hand
    assert "NOT COMPARABLE: two and one read different contents of data.sources.0 (text.txt)" in found.notes


def test_every_problem_is_reported_before_anything_runs(tmp_path):
    fit = Finisher()
    words = ["train.lr=1e-3,,2e-3", "loss.kind=tvd,tvdd", "train.batch_sice=3", "eval.prompts=builtin:test,none.jsonl"]
    with pytest.raises(RecipeError) as raised:
        swept(tmp_path, fit, *words)
    text = str(raised.value)
    assert "train.lr=1e-3,,2e-3: empty value" in text
    assert "all arms: override train.batch_sice=3: train.batch_sice: unknown key" in text
    assert "lr-1e-3_loss-tvdd_prompts-builtin-test" in text
    assert "unknown kind" in text or "tvdd" in text
    words = ["train.lr=1e-3,0.001", "loss.kind=tvd,tvdpp", "eval.prompts=builtin:test,none.jsonl"]
    with pytest.raises(RecipeError) as raised:
        swept(tmp_path, fit, *words)
    problems = raised.value.problems
    assert any(
        "lr-0.001_loss-tvd_" in line and "has the same settings as lr-1e-3_loss-tvd_" in line for line in problems
    )
    assert any("none.jsonl" in line for line in problems)
    assert any("eval.prompts: differs from the first arm" in line for line in problems)
    assert not fit.ran
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_settings_is_refused_before_anything_runs(tmp_path):
    swept(tmp_path, Finisher(), "loss.kind=tvd,ce", "train.max_steps=20", seeds=(0,))
    fit = Finisher()
    with pytest.raises(RecipeError, match="holds a run of other settings") as raised:
        swept(tmp_path, fit, "loss.kind=tvd,ce", "train.max_steps=30", seeds=(0,))
    assert len(raised.value.problems) == 2
    assert not fit.ran


def recipe_with(*words: str, seed: int = 0) -> Recipe:
    return replace(load_recipe("demo", words), seed=seed)


def test_runs_share_the_data_that_does_not_depend_on_what_differs(tmp_path):
    def place(*words: str, seed: int = 0) -> tuple[Path, Path]:
        recipe = recipe_with(*words, seed=seed)
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        data = share_data(recipe, run, tmp_path)
        assert RunFolder(run).data.resolve() == data.resolve()
        return data, (data / "generated").resolve()

    first = place()
    assert (
        place("loss.kind=ce", "train.lr=1e-4", "train.max_steps=70", "export.require={}", "drafter={kind: medusa}")
        == first
    )
    other_weights = place("data.sources.0.weight=1")
    assert other_weights[0] != first[0]
    assert other_weights[1] == first[1]
    for words in (["data.max_length=100"], ["data.generate.num_records=3"], ["target.dtype=float64"]):
        data, texts = place(*words)
        assert data != first[0]
        assert texts != first[1]
    assert place(seed=1)[1] != first[1]
    assert place("eval.validation_prompts=other.jsonl")[0] != first[0]


def test_runs_share_nothing_that_was_made_of_other_files(tmp_path):
    file = tmp_path / "prompts.txt"
    words = (f"data.generate.prompts={{kind: text, path: {file}}}",)
    found = []
    for content in ("one text", "another text"):
        file.write_text(content)
        data = share_data(recipe_with(*words), tmp_path / content, tmp_path / "shared")
        found.append((data, (data / "generated").resolve()))
    assert not set(found[0]) & set(found[1])


def test_a_data_folder_of_the_runs_own_stays(tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    share_data(recipe_with(), tmp_path / "run", tmp_path)
    assert not (tmp_path / "run" / "data").is_symlink()


def test_runs_with_equal_keys_read_the_same_cache():
    first = cached_together(recipe_with())
    assert cached_together(recipe_with("loss.kind=tvd", "train.lr=1")) == first
    # Cross-entropy does not read the target, other steps read other records, another drafter other states.
    for words in (["loss.kind=ce"], ["train.max_steps=70"], ["drafter={kind: eagle}"], ["data.cache=full"]):
        assert cached_together(recipe_with(*words)) != first


def test_runs_of_one_cache_follow_each_other(tmp_path):
    fit = Finisher()
    swept(tmp_path, fit, "train.lr=1e-3,3e-3", "loss.kind=tvd,ce", seeds=(0,))
    assert [name.split("_")[1] for name in fit.ran] == ["loss-tvd", "loss-tvd", "loss-ce", "loss-ce"]


RECIPE = """
name: tiny
target: {{model: {target}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: tvd}}
data:
  max_length: 40
  cache: states
  generate: {{prompts: {{kind: text, path: {text}}}, num_records: 4, max_new_tokens: 8, prompt_tokens: 8}}
  sources: [{{kind: generated}}]
train: {{max_steps: 4, batch_size: 2, warmup_steps: 1, eval_every_steps: 2, eval_prompts: 2, loggers: [csv]}}
eval: {{num_prompts: 2, max_new_tokens: 8, prompt_tokens: 6, speed_prompts: 1, start: false, temperatures: [0],
       prompts: {prompts}, validation_prompts: {prompts}}}
"""


@pytest.mark.slow
@pytest.mark.processes
def test_the_error_of_a_run_is_the_last_message_of_its_process(tmp_path, capfd):
    recipe = load_recipe("demo", ["data.sources.1={kind: text, path: none.txt}", "name=arm"])
    with pytest.raises(DrafttrainError) as raised:
        fit_in_new_process(recipe, tmp_path / "arm")
    assert str(raised.value).startswith("arm: 1 problem\n  data.sources.1: none.txt")
    assert "data.sources.1: none.txt" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_sweep_continues_and_its_data_is_made_once(tmp_path, tiny_folder):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    lines = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "tiny.yaml"
    places = {"target": tiny_folder, "text": tmp_path / "text.txt", "prompts": tmp_path / "prompts.jsonl"}
    recipe.write_text(RECIPE.format(**places))
    words = ["sweep", recipe, "train.lr=1e-3,3e-3", "drafter.hidden_size=32", "--runs", tmp_path]
    command = [sys.executable, "-m", "drafttrain", *map(str, words)]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, text=True)
        while "run 2 of 2" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == Interrupted.exit_code, log.read_text()
    out = tmp_path / "tiny-sweep"
    assert (out / "lr-1e-3_seed-0" / "eval.json").exists()

    def made(folder: Path) -> dict[str, int]:
        return {str(path): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}

    first = {name: made(out / name) for name in ("texts", "data", "lr-1e-3_seed-0")}
    assert any("shard-00000" in path for path in first["texts"])
    assert any("0-cache" in path and path.endswith(".npy") for path in first["data"])
    done = subprocess.run(command, capture_output=True, text=True)
    assert "1 of 2 runs are finished" in done.stderr
    for name, files in first.items():
        now = made(out / name)
        kept = {path: number for path, number in files.items() if not path.endswith(("plan.json", "cache.json"))}
        assert {path: now.get(path) for path in kept} == kept
    content = json.loads((out / "sweep.json").read_text())
    assert [arm["name"] for arm in content["arms"]] == ["lr-1e-3", "lr-3e-3"]
    assert content["arms"][1]["curve"][-1]["step"] == 4
    with (out / "lr-3e-3_seed-0" / "metrics.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["tokens"]) == content["arms"][1]["tokens"]
