"""Several drafters on conversations: the second turn, pairs, averages, slices, and Spec-Bench's files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from drafttrain.checkpoint import About, read_drafter, write_about
from drafttrain.core.errors import CheckpointError, DataError
from drafttrain.core.texts import Sampling
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.eval.arms import Arm, decode
from drafttrain.eval.compared import arm_rows, compared_slice_rows, pair_rows
from drafttrain.eval.figures import compare
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.metrics import PromptCounts
from drafttrain.eval.permutation import holm
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.ngram import NgramSettings
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.result import Result
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.slices import part_of, slices_of
from drafttrain.eval.statistics import ratio_interval
from drafttrain.eval.unfinished import Unfinished
from drafttrain.pipeline.evaluating import check_lengths, evaluate_folders
from drafttrain.target_model import Target
from tests.conftest import random_llama
from tests.data_gen.chats import CHATML, chat_tokenizer

NEW = 6
QUESTIONS = [
    {"question_id": 81 + i, "category": "ab"[i % 2], "language": "en", "turns": [f"q{i}", f"and {i}"][: 1 + (i < 3)]}
    for i in range(4)
]
"""Three questions of two turns, and one of one turn."""
SETTINGS = EvalSettings(
    max_new_tokens=NEW,
    temperatures=[0.0, 1.0],
    speed_prompts=0,
    replay_lengths=[1],
    repetition_ngram=0,
    beside=[NgramSettings()],
)


@pytest.fixture(scope="module")
def target() -> Target:
    tokenizer = chat_tokenizer(CHATML)
    return Target(random_llama(vocab_size=len(tokenizer)).double(), tokenizer, name="T", fingerprint="")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "question.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return path


@pytest.fixture(scope="module")
def folders(target: Target, file: Path) -> dict[str, Path]:
    made = {}
    for name in "AB":
        made[name] = file.parent / name
        made[name].mkdir()
        Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer).save(made[name])
        write_about(made[name], About("medusa", "T", "", target.tokenizer_fingerprint, target.vocab_size, 0))
    return made


@pytest.fixture(scope="module")
def result(target: Target, file: Path, folders: dict[str, Path]) -> Result:
    settings = replace(SETTINGS, prompts=str(file))
    return evaluate_folders(folders, target, settings, dropped=(), answers=file.parent / "answers")


# ---------------------------------------------------------------- conversations


def arms_at(target: Target, folder: Path, temperature: float) -> list[Arm]:
    sources = {"plain": PLAIN, "A": read_drafter(folder, target)}
    return [
        Arm.create(name, source, target, Sampling(temperature), SETTINGS, length=FixedLengthSettings())
        for name, source in sources.items()
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_second_turn_is_what_the_template_gives_after_the_targets_own_answer(target, file, folders, temperature):
    prompts = read_prompts(str(file), target.tokenizer, prompt_tokens=None)
    arms = plain, drafted = arms_at(target, folders["A"], temperature)
    decode(arms, prompts, replace(SETTINGS, batch_size=3), generate=0)
    assert [one.id for one in plain.prompts] == ["81", "82", "83", "84", "81 turn 2", "82 turn 2", "83 turn 2"]
    assert [(one.turn, one.domain, one.unit) for one in plain.prompts[3:5]] == [(1, "b", "84"), (2, "a", "81")]
    assert drafted.prompts == plain.prompts, "all arms read the same prompts"
    differ = 0
    for place, record in enumerate(QUESTIONS[:3]):
        answers = [target.tokenizer.decode(arm.generations[place].tokens, skip_special_tokens=True) for arm in arms]
        first, second = record["turns"]
        whole = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": second},
        ]
        wanted = target.tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=True)
        assert list(plain.prompts[4 + place].tokens) == list(wanted["input_ids"])
        differ += answers[0] != answers[1]
    # The control: at temperature 1 the other arm gave other answers, so a prompt of its own would be another one.
    assert (differ > 0) == (temperature > 0)


def test_stored_outputs_give_the_same_second_turns(target, file, folders, tmp_path):
    prompts = read_prompts(str(file), target.tokenizer, prompt_tokens=None)
    found = []
    for _ in range(2):
        arms = arms_at(target, folders["A"], 1.0)
        decode(arms, prompts, SETTINGS, generate=0, unfinished=Unfinished(tmp_path / "stored", {}))
        found.append((arms[1].prompts, [one.seconds for one in arms[1].generations]))
    assert found[0] == found[1], "also the times: nothing was decoded again"


def test_a_conversation_that_is_too_long_or_no_text_is_refused(file, tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1)
    target = Target(GPT2LMHeadModel(config), tokenizer, name="T", fingerprint="")
    prompts = read_prompts(str(file), tokenizer, prompt_tokens=None)
    settings = replace(SETTINGS, max_new_tokens=20)
    with pytest.raises(CheckpointError, match="longest prompt"):
        check_lengths(target, prompts, settings)
    # The control: without their second turns they fit.
    check_lengths(target, [replace(one, questions=()) for one in prompts], settings)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"turns": ["a", 3]}) + "\n")
    with pytest.raises(DataError, match=r"line 1: turns\.1"):
        read_prompts(str(tmp_path / "odd.jsonl"), tokenizer, prompt_tokens=None)


# ---------------------------------------------------------------- figures


def counts(id, tokens, rounds, **more):
    return PromptCounts(id, more.pop("domain", ""), tokens, rounds, 0, 0, (), (), **more)


def test_the_turns_of_a_conversation_are_one_unit_of_an_interval():
    """A second turn that repeats the first is no new evidence."""
    once = [counts(str(i), 20 + 3 * i, 10) for i in range(8)]
    again = [replace(one, id=f"{one.id} turn 2", turn=2, conversation=one.id) for one in once]
    single, twice = (ratio_interval(*part_of(part)) for part in (once, once + again))
    assert (twice.value, twice.num_prompts) == (single.value, 8)
    assert (twice.low, twice.high) == pytest.approx((single.low, single.high))
    apart = ratio_interval(*part_of([*once, *(replace(one, conversation="") for one in again)]))
    assert apart.high - apart.low < 0.8 * (twice.high - twice.low), "the control: turns as prompts of their own"


def test_averages_and_slices_by_hand():
    first = [counts("a", 40, 10, domain="x", context=20), counts("b", 10, 5, domain="y", context=300)]
    first.append(counts("c", 30, 10, domain="x", context=5000))
    second = [replace(one, num_rounds=10) for one in first]
    found = compare(first, second)
    assert found.block_efficiency.value == pytest.approx(80 / 25 - 80 / 30)
    assert found.macro.value == pytest.approx((4 + 2 + 3) / 3 - (4 + 1 + 3) / 3)
    by_slice = slices_of(first)
    assert list(by_slice) == ["domain", "context"], "they have one turn and no language"
    assert {name: (one.value, one.num_prompts) for name, one in by_slice["domain"].items()} == {
        "x": (70 / 20, 2),
        "y": (2.0, 1),
    }
    assert list(by_slice["context"]) == ["0 to 255 tokens", "256 to 1023 tokens", "4096 to 16383 tokens"]
    assert found.slices["domain"]["x"].permutation_p_value == 1
    assert math.isnan(found.slices["domain"]["y"].holm_p_value), "one prompt"


def test_p_values_of_the_slices_are_corrected_together():
    generator = np.random.default_rng(0)
    first = [counts(str(i), 40, 8 + int(generator.integers(4)), domain="uvw"[i % 3]) for i in range(24)]
    second = [replace(one, num_rounds=one.num_rounds + 2 * (one.domain == "u") + i % 2) for i, one in enumerate(first)]
    slices = list(compare(first, second).slices["domain"].values())
    raw = [one.permutation_p_value for one in slices]
    assert [one.holm_p_value for one in slices] == holm(raw)
    assert raw[0] == 2 / 2**8, "all eight prompts of the first slice differ in one direction"
    assert slices[0].holm_p_value == 3 * raw[0]


def test_every_pair_is_compared_and_every_arm_is_in_the_table(result):
    for part in result.temperatures:
        assert list(part.comparisons) == ["A - B", "A - ngram", "B - ngram"]
        assert all(one.speed is not None for one in part.comparisons.values())
        rows = list(arm_rows(part))
        assert [row[1] for row in rows] == ["A", "B", "ngram"]
        assert [row[7] for row in rows] == ["-", "A", "A"]
        difference = part.drafters["ngram"].block_efficiency.value - part.drafters["A"].block_efficiency.value
        assert float(rows[2][6].split()[0]) == pytest.approx(difference, abs=6e-4)
        assert len(list(pair_rows(part))) == 3
        assert {(row[2], row[3]) for row in compared_slice_rows(part)} == {
            *(("domain", one) for one in "ab"),
            *(("turn", one) for one in "12"),
        }
    assert result.num_prompts == 7
    assert result.temperatures[0].drafters["A"].block_efficiency.num_prompts == 4
    assert result.temperatures[0].drafters["A"].parity.exact
    assert result.temperatures[0].drafters["A"].parity.num_prompts == 7


# ---------------------------------------------------------------- Spec-Bench


def test_spec_bench_computes_our_figures_from_the_answer_files(result, file):
    """As its speed.py: mean accepted length over all rounds; quotient of the mean tokens per second of the questions."""
    for part in result.temperatures:
        plain, *others = (
            [json.loads(line) for line in path.read_text().splitlines()]
            for name in ("plain", "A", "B", "ngram")
            for path in [file.parent / "answers" / f"{name}-temperature-{part.temperature:g}.jsonl"]
        )
        assert [(one["question_id"], one["category"]) for one in plain] == [(81, "a"), (82, "b"), (83, "a"), (84, "b")]
        assert [len(one["choices"][0]["turns"]) for one in plain] == [2, 2, 2, 1]
        for answers, figures in zip(others, part.drafters.values(), strict=True):
            lengths = [length for one in answers for length in one["choices"][0]["accept_lengths"]]
            assert np.mean(lengths) == pytest.approx(figures.block_efficiency.value)
            assert len(lengths) == sum(sum(one["choices"][0]["decoding_steps"]) for one in answers)
            speed, base = (
                np.mean([sum(one["choices"][0]["new_tokens"]) / sum(one["choices"][0]["wall_time"]) for one in part])
                for part in (answers, plain)
            )
            assert speed / base == pytest.approx(figures.macro.speedup.value)


def test_spec_bench_and_mt_bench_are_read_with_their_later_turns(shared_folder, target):
    data = shared_folder / "data"
    for name, later in (("spec_bench", 80), ("mt_bench", 80)):
        found = read_prompts(str(data / name / "question.jsonl"), target.tokenizer, prompt_tokens=None)
        assert sum(len(one.questions) for one in found) == later
        assert found[0].id == "81"
        assert found[0].questions[0].startswith("Rewrite your previous response")
