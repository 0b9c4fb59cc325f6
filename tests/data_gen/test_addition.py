"""The addition task: correct, with known words, its sides disjoint."""

import json
import random

import pytest

from drafttrain.config.load import load_recipe
from drafttrain.data_gen.checkers.numeric import Numeric, NumericSettings
from drafttrain.data_gen.sources.addition import WORDINGS, Addition, AdditionSettings, problem, solution
from drafttrain.eval.prompts import prompt_file
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.tokenizer import load_tokenizer


@pytest.mark.parametrize(("first", "second", "digits"), [(47, 85, 2), (0, 0, 2), (99, 99, 2), (507, 493, 3), (4, 5, 1)])
def test_a_solution_ends_in_the_sum_in_any_wording(first, second, digits):
    checker = Numeric(NumericSettings(spaced_digits=True))
    texts = {solution(first, second, num_digits=digits, rng=random.Random(seed)) for seed in range(20)}
    assert len(texts) > 1
    assert {checker.answer(text, id="") for text in texts} == {first + second}


def test_the_steps_are_those_of_written_addition():
    words = solution(47, 85, num_digits=2, rng=random.Random(0)).split()
    plain = [next((meaning for meaning, choices in WORDINGS.items() if word in choices), word) for word in words]
    assert " ".join(plain) == (
        "7 and 5 and 0 make 1 2 so put 2 carry 1 . 4 and 8 and 1 make 1 3 so put 3 carry 1 . answer 1 3 2"
    )
    assert problem(4, 85, num_digits=2) == "0 4 + 8 5 ="


def test_the_sides_share_no_problem_and_items_are_functions_of_the_seed():
    def prompts(**settings: object) -> list[str]:
        return [item.value["prompt"] for item in Addition(AdditionSettings(num_records=300, **settings)).items()]

    train, held_out = prompts(), prompts(split="held_out")
    assert not set(train) & set(held_out)
    assert prompts() == train
    assert prompts(seed=1) != train


def test_every_word_is_a_token_of_the_builtin_tokenizer():
    tokenizer = load_tokenizer(resolve_folder("builtin:addition"))
    for item in Addition(AdditionSettings(num_records=50)).items():
        text = f"{item.value['prompt']} {item.value['completion']}"
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


def test_no_test_prompt_was_trained_on_or_chosen_by():
    """The recipes of target, drafter and judge never read a problem on which results are reported."""

    def problems(name: str) -> set[str]:
        sources = [source for source in load_recipe(name).data.sources if source.kind == "addition"]
        assert sources
        return {item.value["prompt"] for source in sources for item in Addition(source).items()}

    def prompts(name: str) -> list[str]:
        return [json.loads(line)["prompt"] for line in prompt_file(name).read_text().splitlines()]

    reported, chosen_by = prompts("builtin:addition_test"), prompts("builtin:addition")
    assert len(set(reported)) == len(reported) == 500
    assert not set(reported) & set(chosen_by)
    for name in ("tiny_judge", "tiny_judge_target", "tiny_judge_drafter"):
        assert not set(reported) & problems(name)
    # Control: the comparison sees a problem that two draws of one side share.
    drawn = Addition(AdditionSettings(num_records=300, split="held_out", seed=3)).items()
    assert set(reported) & {item.value["prompt"] for item in drawn}
