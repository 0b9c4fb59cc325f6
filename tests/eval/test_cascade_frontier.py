"""The frontier: costs are those of the ledger, baselines are both models and random routing, everything says LOSSY."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import DataError
from drafttrain.core.gpus import gpu_named
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.checkers.numeric import Numeric, NumericSettings
from drafttrain.eval.cascade.frontier import Frontier, decoder_of, measure
from drafttrain.eval.cascade.kinds.foreal import ForealSettings
from drafttrain.eval.cascade.kinds.random import at_rate
from drafttrain.eval.cascade.router import Pair
from drafttrain.eval.cascade.settings import FrontierSettings
from drafttrain.eval.cascade.shown import COLUMNS, draw, heading, quality, rows
from drafttrain.eval.cascade.spans import Unit
from drafttrain.eval.clock import Efficiency, roofline_of
from drafttrain.eval.page import write_picture
from drafttrain.target_model import Target
from tests.cli.test_cli import call
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.test_cascade import MARKS, NEW

PROMPTS = [Prompt(str(i), list(range(1 + i, 5 + 2 * i)), answer=str(i)) for i in range(4)]
BY = FrontierSettings(ForealSettings(0.5, 3, MARKS), [1.0, 0.4], cost="h100")


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")
    return Pair(target, random_llama(seed=4, num_layers=1).double(), Sampling(), NEW, stop_tokens=())


class Parity:
    """Takes an output for right if its length in characters is even, so that some are."""

    def answer(self, text: str, *, id: str) -> int:
        return len(text) % 2

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        return not self.answer(text, id=id)


@pytest.fixture(scope="module")
def frontier(pair: Pair) -> Frontier:
    return measure(pair, PROMPTS, BY, checker=Parity(), small="small")


def test_baselines_are_both_models_and_random_routing_at_the_same_rate(frontier):
    assert frontier.large.by_large.value == 1
    assert frontier.small_alone.by_large.value == 0
    assert frontier.large.agreement.equal_outputs.value == 1
    assert frontier.large.solved_less_large.value == 0
    for step in frontier.steps:
        assert step.random.settings["rate"] == pytest.approx(step.cascade.by_large.value)
        assert step.random.settings["marks"] == MARKS  # of the same units: sentences
        assert step.solved_less_random.value == pytest.approx(step.cascade.solved.value - step.random.solved.value)
    assert [step.value for step in frontier.steps] == [0.4, 1.0]
    assert frontier.steps[0].cascade.by_large.value < frontier.steps[1].cascade.by_large.value


def test_costs_are_sums_over_the_ledger_divided_once(frontier, pair):
    def outputs(settings: Any) -> list[Any]:
        decoder = decoder_of(settings, pair)
        return [decoder.generate(prompt) for prompt in PROMPTS]

    found, large = outputs(ForealSettings(1.0, 3, MARKS)), outputs(at_rate(1.0, Unit()))
    gpu = gpu_named("h100")
    assert gpu is not None
    clock = roofline_of(gpu, Efficiency())
    point = frontier.steps[1].cascade
    for name, of in {
        "bytes": lambda e: e.bytes_read,
        "flops": lambda e: e.work.flops,
        "h100": clock,
    }.items():
        sums = [sum(of(event) for one in some for event in one.forwards) for some in (found, large)]
        assert point.cost[name].value == pytest.approx(sums[0] / sums[1])
        assert frontier.large.cost[name].value == 1
        assert frontier.small_alone.cost[name].value < 1
    calls = [event.model for one in found for event in one.forwards]
    assert point.large_calls == calls.count("target") / len(PROMPTS)
    assert point.small_calls == calls.count("drafter") / len(PROMPTS)
    assert point.num_switches == sum(one.num_switches for one in found) / len(PROMPTS)


def test_everything_that_is_printed_says_lossy(frontier, tmp_path):
    assert frontier.exactness == "lossy"
    assert heading(frontier).startswith("LOSSY")
    shown = rows(frontier)
    assert [row[0] for row in shown[:2]] == ["large alone", "small alone"]
    assert len(shown) == 2 + 2 * 2
    assert all(len(row) == len(COLUMNS) for row in shown)
    titles = []

    def drawn(axes: Any) -> None:
        draw(axes, frontier)
        titles.append(axes[0].get_title())

    write_picture(tmp_path / "frontier.png", drawn, columns=1, height=3.6)
    assert titles[0].startswith("LOSSY")


def test_without_a_checker_quality_is_agreement_and_sampled_texts_have_none(frontier, pair):
    greedy = measure(pair, PROMPTS[:2], replace(BY, values=[0.5, 1.0], cost="bytes"))
    assert greedy.large.solved is None
    assert quality(greedy.large).value == 1
    assert quality(greedy.small_alone).value < 1
    assert rows(greedy)[2][2:5] == ["-", "-", ""]
    with pytest.raises(DataError, match=r"eval\.checker"):
        measure(replace(pair, sampling=Sampling(1.0)), PROMPTS, BY)
    assert quality(frontier.large) is frontier.large.solved


def test_a_prompt_without_an_answer_is_named_as_the_problem(pair):
    class Answered(Numeric):
        def answer(self, text: str, *, id: str) -> Any:
            return 1

    with pytest.raises(DataError, match="no answer that can be compared"):
        measure(pair, [Prompt("a", [1, 2])], replace(BY, values=[0, 1]), checker=Answered(NumericSettings()))


# ---------------------------------------------------------------- the command

ARGUMENTS = ["cascade", "builtin:adder", "builtin:adder_drafter", "--prompts", "builtin:addition", "eval.num_prompts=2"]
CHECKER = "eval.checker={kind: numeric, after: answer, spaced_digits: true}"


def test_the_command_writes_a_frontier_of_the_shipped_task(tmp_path: Path):
    by = "cascade.by={kind: spec_reason, judge: {kind: likelihood}, marks: ['.']}"
    options = ["cascade.values=[0,9.5]", by, CHECKER, "eval.max_new_tokens=40", "--out", str(tmp_path)]
    printed, _ = call(*ARGUMENTS, *options)
    assert "LOSSY: spec_reason between builtin:adder and builtin:adder_drafter" in printed
    held = json.loads((tmp_path / "cascade.json").read_text())
    assert held["exactness"] == "lossy"
    small, large = (step["cascade"]["by_large"]["value"] for step in held["steps"])
    assert (small, large) == (0, 1)
    assert held["large"]["solved"]["value"] == 1
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cascade.values=[1]"], "a frontier has two different values at least"),
        (["cascade.by={kind: foreal}", "cascade.values=[0.5,2]"], "values: rho of foreal must be <= 1, got [0.5, 2"),
        (["cascade.cost=h9000"], "cascade.cost: must be one of bytes, flops, seconds, or a GPU: "),
        (["cascade.by={kind: foreal, rho: 2}"], "cascade.by.rho: must be >= 0 and <= 1, got 2"),
        (["cascade.by={kind: fore}"], "unknown cascade 'fore'. Did you mean 'foreal'?"),
        (["cascade.by={kind: random}"], "tokens: null needs marks"),
        (["cascade.by={kind: foreal}", "cascade.draft={kind: tree}"], "draft: tree is a tree"),
        (["cascade.by={kind: bild}", "cascade.draft={kind: fixed}"], "draft: bild needs each token as it is written"),
        (["cascade.draft={kind: fixed}"], "draft: entropy needs each token as it is written"),
        (
            ["cascades.cost=bytes"],
            "cascades: only these can be given here: target.key=value, eval.key=value, cascade.key",
        ),
        (["eval.prompts=builtin:test"], "--prompts and eval.prompts both name prompts"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(words, message):
    _, complaint = call(*ARGUMENTS, *words, code=2)
    assert message in " ".join(complaint.split())


def test_two_models_are_needed():
    _, complaint = call("cascade", "builtin:adder", code=2)
    assert "give a target and a small model, got 1 names" in complaint


def test_the_python_example_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "cascades.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/cascades.md", "exec"), names)
    assert names["frontier"].exactness == "lossy"
    assert names["frontier"].large.solved.value == 1
