"""The frontier on the trained pair that is shipped, the task score, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import drafttrain
from drafttrain.core.errors import CheckpointError, DataError, RecipeError
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.checkers.numeric import NumericSettings
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.long_prompt.choices.at_random import AtRandomSettings
from drafttrain.eval.long_prompt.choices.last_window import LastWindowSettings
from drafttrain.eval.long_prompt.choices.speckv import SpecKVSettings
from drafttrain.eval.long_prompt.choices.specpc import SpecPCSettings
from drafttrain.eval.long_prompt.frontier import frontier
from drafttrain.eval.long_prompt.kept import Amount
from drafttrain.eval.long_prompt.result import LongPromptResult
from drafttrain.eval.long_prompt.settings import LongPromptSettings
from drafttrain.eval.prompts import prompt_file, read_prompts
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target
from tests.cli.test_cli import call
from tests.conftest import byte_tokenizer, random_llama

QUARTER, HALF, WHOLE = (Amount(share=share) for share in (0.25, 0.5, 1.0))
WINDOW = 8


@pytest.fixture(scope="module")
def target() -> Target:
    return drafttrain.load_target("builtin:target")


@pytest.fixture(scope="module")
def prompts(target: Target) -> list[Prompt]:
    """Texts of several pieces of source, such as a prompt with several files."""
    texts = [json.loads(line)["text"] for line in prompt_file("builtin:test").read_text().splitlines()]
    joined = ["\n".join(texts[first : first + 5]) for first in range(0, 40, 5)]
    return [Prompt(str(i), target.tokenizer(text)["input_ids"][:200]) for i, text in enumerate(joined)]


@pytest.fixture(scope="module")
def measured(target: Target, prompts: list[Prompt]) -> LongPromptResult:
    choices = [
        SpecKVSettings(window_tokens=WINDOW),
        AtRandomSettings(window_tokens=WINDOW),
        LastWindowSettings(),
    ]
    return frontier(
        target,
        drafttrain.load_drafter("builtin:drafter", target),
        prompts,
        [QUARTER, HALF, WHOLE],
        settings=LongPromptSettings(choices),
        evaluation=EvalSettings(max_new_tokens=16),
    )


def values(result: LongPromptResult, name: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for one in result.points:
        found.setdefault(one.choice.split(",")[0], []).append(getattr(one, name).value)
    return found


def test_agreement_and_recall_rise_with_what_is_kept_and_the_whole_is_exact(measured):
    for choice, distances in values(measured, "tvd").items():
        assert distances[0] > distances[1] > distances[2] == 0, choice
    for choice, recalls in values(measured, "recall").items():
        assert recalls[0] < recalls[1] < recalls[2] == pytest.approx(1), choice
    assert [one.kept_share for one in measured.points[:3]] == pytest.approx([0.25, 0.5, 1], abs=0.005)
    assert measured.exactness == "lossy"


@pytest.mark.parametrize("baseline", ["random", "last_window"])
def test_a_trained_drafters_look_ahead_beats_choices_without_it(measured, baseline):
    paired = [
        one for one in measured.differences if one.choice.startswith("speckv") and one.baseline.startswith(baseline)
    ]
    assert [one.amount for one in paired] == ["25%", "50%", "100%"]
    assert all(one.tvd.num_prompts == 8 for one in paired)
    for one in paired[:2]:
        assert one.tvd.high < 0, f"{one}"
    # Of a quarter the last window has nearly as much of the attention: what it lacks is what matters.
    assert paired[1].recall.low > 0
    assert (paired[2].tvd.value, paired[2].tvd.p_value) == (0, 1), "control: nothing is chosen of the whole"


def test_choices_are_compared_with_those_of_the_same_unit(measured):
    names = {(one.choice.split(",")[0], one.baseline.split(",")[0]) for one in measured.differences}
    assert names == {("speckv", "random"), ("speckv", "last_window")}, "no baseline here chooses tokens"


def test_a_target_that_drafts_for_itself_finds_tokens_that_matter(target, prompts):
    """SpecPC by the strongest drafter there is; the embedded one of two layers is no better than random tokens."""
    choices = [
        SpecPCSettings(window_tokens=32, pool_tokens=1, neighbours=0, positions="kept"),
        AtRandomSettings(of="tokens", positions="kept"),
    ]
    found = frontier(
        target,
        CausalLMDrafter(target.model),
        prompts,
        [HALF],
        settings=LongPromptSettings(choices),
        evaluation=EvalSettings(max_new_tokens=8),
    )
    (one,) = found.differences
    assert one.recall.low > 0


def test_the_task_score_is_the_targets_own_with_the_whole_prompt():
    target = drafttrain.load_target("builtin:adder")
    drafter = drafttrain.load_drafter("builtin:adder_drafter", target)
    evaluation = EvalSettings(
        prompts="builtin:addition_test", max_new_tokens=64, checker=NumericSettings(after="answer", spaced_digits=True)
    )
    sums = read_prompts("builtin:addition_test", target.tokenizer, prompt_tokens=None, limit=5)
    settings = LongPromptSettings([LastWindowSettings(first_tokens=0)])
    found = frontier(target, drafter, sums, [Amount(tokens=3), WHOLE], settings=settings, evaluation=evaluation)
    assert found.whole_task is not None
    part, whole = (one.task for one in found.points)
    assert found.whole_task.value >= 0.8
    assert (whole.score.value, whole.less_the_targets.value) == (found.whole_task.value, 0)
    assert part.score.value < 0.5, "control: without the first number no sum is right"


def test_a_choice_that_is_a_last_window_at_an_amount_is_named(target, prompts, capsys):
    drafter = drafttrain.load_drafter("builtin:drafter", target)
    choices = [
        *(SpecKVSettings(window_tokens=8), SpecPCSettings(window_tokens=8)),
        *(AtRandomSettings(window_tokens=8), *[LastWindowSettings(of, first_tokens=0) for of in ("keys", "tokens")]),
    ]
    given = [replace(prompts[0], tokens=prompts[0].tokens[:length]) for length in (9, 16, 24)]
    given = [replace(one, id=str(number)) for number, one in enumerate(given)]

    def named(kept: int) -> list[str]:
        result = frontier(
            target,
            drafter,
            given,
            [Amount(tokens=kept)],
            settings=LongPromptSettings(choices),
            evaluation=EvalSettings(max_new_tokens=2),
        )
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        same = {one.of: (one.tvd.value, one.recall.value) for one in result.points if one.choice.startswith("last")}
        equal = [one.choice for one in result.points if (one.tvd.value, one.recall.value) == same[one.of]]
        assert [one for one in equal if not one.startswith("last")] == [one[6:].split(" (")[0] for one in notes]
        return notes

    within = named(9)
    assert [note.split(" (")[0] for note in within] == [
        "note: speckv, window_tokens 8",
        "note: random, window_tokens 8",
    ]
    assert "--keep 9 leaves no room beside the window of 8 tokens in 2 of 3 prompts" in within[0]
    assert [note.split(",")[0] for note in named(8)] == ["note: speckv", "note: specpc", "note: random"]
    assert named(10) == [], "control: one more is chosen"


def refused(target: Any, drafter: Any, given: list[Prompt], **changed: Any) -> None:
    frontier(target, drafter, given, [HALF], evaluation=EvalSettings(max_new_tokens=8), **changed)


def test_what_cannot_be_measured_is_refused_by_name(target, prompts):
    eagle = drafters.entry("eagle3")
    made = eagle.component.create(eagle.settings(), target=target, tokenizer=target.tokenizer)
    with pytest.raises(
        CheckpointError, match=r"long-prompt: needs a drafter with a language model .* drafter\.kind eagle3"
    ):
        refused(target, made, prompts)
    drafter = CausalLMDrafter(random_llama(vocab_size=4096))
    with pytest.raises(DataError, match="fewer than 2 tokens have nothing to leave out: short"):
        refused(target, drafter, [replace(prompts[0], id="short", tokens=[5])])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=257, num_hidden_layers=1, sliding_window=16, **sizes)
    sliding = Target(MistralForCausalLM(config).eval(), byte_tokenizer(), name="m", fingerprint="")
    with pytest.raises(
        CheckpointError, match="target: parts of a prompt cannot be kept: texts reach its sliding window"
    ):
        refused(sliding, CausalLMDrafter(random_llama()), [Prompt("a", list(range(1, 40)))])
    checked = EvalSettings(max_new_tokens=8, checker=NumericSettings(after=""))
    numbers = Prompt("0", target.tokenizer("[0, 1, 2, 3, 4, 5, 6, ")["input_ids"])
    with pytest.raises(DataError, match=r"eval\.checker: prompt 0 has no answer that can be compared"):
        frontier(target, drafter, [numbers], [HALF], evaluation=checked)
    assert LongPromptSettings([SpecKVSettings(), SpecKVSettings()]).check() == ["choices: speckv occurs twice"]
    with pytest.raises(RecipeError):
        refused(target, drafter, prompts, settings=LongPromptSettings([]))


def test_the_command_prints_and_writes_the_frontier(tmp_path: Path):
    choices = "[{kind: speckv, window_tokens: 4}, {kind: last_window, first_tokens: 1}, {kind: random, of: tokens}]"
    out, _ = call(
        "long-prompt",
        "builtin:drafter",
        *("--target", "builtin:target", "--keep", "12,50%", "--out", str(tmp_path)),
        *("eval.num_prompts=2", "eval.max_new_tokens=4", f"long_prompt.choices={choices}"),
    )
    assert "LOSSY: 2 prompts, of which the target keeps a part" in out
    assert "paired over prompts" in out
    found = json.loads((tmp_path / "long_prompt.json").read_text())
    assert [(one["choice"], one["amount"]) for one in found["points"]][:2] == [
        ("speckv, window_tokens 4", "12"),
        ("speckv, window_tokens 4", "50%"),
    ]
    assert found["exactness"] == "lossy"
    assert found["choices"][0]["kind"] == "speckv"
    assert (tmp_path / "long_prompt.png").stat().st_size > 5000


def test_arguments_are_checked_all_at_once():
    _, err = call("long-prompt", "one", "two", "--keep", "0,110%,x,5,5", code=2)
    for problem in ("give one drafter, got 2", "got '0'", "got '110%'", "got 'x'", "each amount once"):
        assert problem in err
    _, err = call("long-prompt", "builtin:drafter", "long_prompt.choices=[{kind: spekv}]", code=2)
    assert "unknown choice of a prompt's keys 'spekv'. Did you mean 'speckv'?" in err
