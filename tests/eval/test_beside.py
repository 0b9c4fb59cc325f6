"""Training-free proposers beside a drafter: arms of the same evaluation; prompt lookup against transformers' own."""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from drafttrain.checkpoint import About, write_about
from drafttrain.config.load import load_sections
from drafttrain.core.errors import RecipeError
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.texts import Sampling
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.eval.arms import Arm
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.proposers import TrainingFree
from drafttrain.eval.proposers.ngram import Ngram, NgramSettings
from drafttrain.eval.proposers.none import NoDraftSettings
from drafttrain.eval.proposers.rasd import RasdSettings
from drafttrain.eval.proposers.token_recycling import TokenRecyclingSettings
from drafttrain.eval.report import write_report
from drafttrain.eval.result import Result, read_result
from drafttrain.eval.settings import EvalSettings
from drafttrain.eval.table import show
from drafttrain.serving.card import model_card
from drafttrain.serving.draft_length import best_length
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS
from tests.eval.test_suffix_automaton import by_search

NEW = 24


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="T", fingerprint="")


@pytest.fixture(scope="module")
def folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside") / "drafter"
    folder.mkdir()
    Medusa.create(MedusaSettings(num_heads=2), target=target, tokenizer=target.tokenizer).save(folder)
    write_about(folder, About("medusa", "T", "", target.tokenizer_fingerprint, target.vocab_size, 0))
    return folder


@pytest.fixture(scope="module")
def settings() -> EvalSettings:
    """Prompt lookup at two lengths and twice; outputs of a random model repeat, so it is accepted there."""
    return EvalSettings(
        max_new_tokens=NEW,
        temperatures=[0.0],
        speed_prompts=0,
        replay_lengths=[1, 2],
        repetition_ngram=0,
        also=[FixedLengthSettings(2)],
        beside=[NgramSettings(), NgramSettings(min_ngram=3), RasdSettings(), TokenRecyclingSettings(warm=True)],
    )


@pytest.fixture(scope="module")
def result(target: Target, folder: Path, settings: EvalSettings) -> Result:
    return evaluate({"drafter": folder}, target, PROMPTS, settings)


def test_a_proposer_is_an_arm_of_the_same_evaluation_at_every_length(result, target, settings):
    (part,) = result.temperatures
    names = ["drafter", "ngram", "ngram, min_ngram 3", "rasd", "token_recycling, warm True"]
    assert list(part.drafters) == [*names, *(f"{name} (fixed 2)" for name in names)]
    assert part.drafters["rasd"].drafter_calls == part.drafters["drafter"].drafter_calls, "the drafter is a part of it"
    assert part.drafters["rasd"].proposer == {
        "kind": "rasd",
        "retrieval": {"kind": "ngram", "min_ngram": 1},
        "drafter": None,
        "retrieved": 8,
        "min_probability": 0.01,
        "chain": False,
    }
    assert all(one.parity is not None and one.parity.exact for one in part.drafters.values())
    assert list(result.drafters) == ["drafter"], "it is no folder"
    found = part.drafters["ngram"]
    assert found.parity.exact
    assert found.drafter_calls == 0
    assert found.round.drafter_ms == 0
    assert (found.alpha, found.replay) == (None, {})
    assert found.proposer == {"kind": "ngram", "min_ngram": 1}
    assert (part.drafters["drafter"].alpha is None, part.drafters["drafter"].proposer) == (False, None)
    # The same outputs and rounds as an arm of its own decodes.
    alone = Arm.create("", TrainingFree(NgramSettings()), target, Sampling(), settings, length=FixedLengthSettings())
    rounds = [len(one.rounds) for one in alone.engine.generate(PROMPTS)]
    assert sum(rounds) == found.target_calls < NEW * len(PROMPTS)


def test_it_is_compared_with_the_drafter_paired_over_prompts_and_in_speed(result):
    (part,) = result.temperatures
    drafter, ngram = (part.drafters[name].block_efficiency.value for name in ("drafter", "ngram"))
    compared = part.comparisons["drafter - ngram"]
    assert compared.block_efficiency.value == pytest.approx(drafter - ngram)
    assert compared.speed is not None
    shorter = " (fixed 2)"
    assert f"drafter{shorter} - ngram{shorter}" in part.comparisons


def test_tables_page_card_and_file_have_it(result, tmp_path, capsys):
    result.write(tmp_path / "eval.json")
    read = read_result(tmp_path / "eval.json").temperatures[0].drafters["ngram"]
    assert (read.alpha, read.proposer) == (None, {"kind": "ngram", "min_ngram": 1})
    show(result)
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    (counted,) = [line for line in shown.splitlines() if re.search(r"\bngram  +\S+ \[.*exact 3/3", line)]
    assert re.search(r"\]( \(not reliable, n = 3\))? +- ", counted), "it has no alpha"
    assert re.search(r"\bdrafter - ngram +[+-]\d", shown)
    write_report(tmp_path, result, title="T", command="")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<td>ngram<td>", page)) == 4, "compared, counts, times, rounds"
    drawn = [base64.b64decode(one).decode() for one in re.findall(r"svg\+xml;base64,([^\"]+)", page)]
    assert all("ngram, temperature 0" in one for one in drawn[:2])
    (part,) = result.temperatures
    card = model_card("N", result, drafter="drafter", recipe="", command="")
    assert f"| 0 | ngram | {part.drafters['ngram'].block_efficiency.text()} |" in card
    assert "| 0 | ngram (fixed" not in card, "the card is about one length"
    assert best_length(result).num_draft_tokens in (1, 2), "by the drafter's replay"


def test_without_one_the_card_has_no_such_table(target, folder, settings):
    alone = evaluate({"drafter": folder}, target, PROMPTS[:1], EvalSettings(max_new_tokens=4, temperatures=[0.0]))
    assert "need no training" not in model_card("N", alone, drafter="drafter", recipe="", command="")


def test_a_drafter_with_the_name_of_a_proposer_is_refused(target, folder, settings):
    with pytest.raises(ValueError, match=r"eval\.beside: ngram is also the name of a drafter"):
        evaluate({"ngram": folder}, target, PROMPTS, settings)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[{kind: ngram}, {kind: ngram, min_ngram: 1}]", "beside: ngram occurs twice"),
        ("[{kind: none}]", "beside: none is plain decoding"),
        ("[{kind: ngrm}]", "unknown proposer 'ngrm'. Did you mean 'ngram'?"),
        ("[{kind: ngram, min_ngram: 0}]", "min_ngram"),
        ("[{kind: aded, corpus: nowhere.txt}]", "corpus: nowhere.txt: no such file"),
    ],
)
def test_a_wrong_list_is_refused_in_a_sentence(value, problem):
    with pytest.raises(RecipeError) as error:
        load_sections(["eval"], [f"eval.beside={value}"])
    assert problem in str(error.value)
    (read,) = load_sections(["eval"], ["eval.beside=[{kind: ngram}]"])
    assert read.as_dict()["beside"] == [{"kind": "ngram", "min_ngram": 1}]
    assert TrainingFree(NoDraftSettings()).label == "none"


def theirs(text: Sequence[int], *, most: int) -> list[int]:
    """Return what transformers' prompt lookup drafts after a text."""
    generator = PromptLookupCandidateGenerator(
        num_output_tokens=most, max_matching_ngram_size=len(text), max_length=10_000
    )
    drafted, _ = generator.get_candidates(torch.tensor([list(text)]))
    return drafted[0, len(text) :].tolist()


def test_prompt_lookup_drafts_what_transformers_drafts_where_the_match_occurred_once():
    """Where it occurred more often, transformers copies from the first occurrence, this proposer from the last one."""
    draw = random.Random(0)
    text = [draw.randrange(12) for _ in range(150)]
    context, budget, same, other = Context("0", [], 0), Budget(5, 5), {0: 0, 1: 0}, 0
    lookup = Ngram().start(context)
    for end in range(4, len(text)):
        context.tokens[:] = text[:end]
        ours = lookup.draft(budget, torch.Generator()).tokens_N.tolist()[1:]
        their = theirs(text[:end], most=5)
        length, ends = by_search(text[:end])
        if length == 0 or len(ends) == 1:
            assert ours == their
            same[len(ends) if length else 0] += 1
        else:
            other += ours != their
    assert same[1] > 0
    assert other > 0
