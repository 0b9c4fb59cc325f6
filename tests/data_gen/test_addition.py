"""The addition task: right, of known words, its sides apart."""

import random

import pytest

from drafttrain.data_gen.checkers.numeric import Numeric, NumericSettings
from drafttrain.data_gen.sources.addition import WORDINGS, Addition, AdditionSettings, problem, solution
from drafttrain.target.frozen import load_tokenizer, resolve_folder


@pytest.mark.parametrize(("first", "second", "digits"), [(47, 85, 2), (0, 0, 2), (99, 99, 2), (507, 493, 3), (4, 5, 1)])
def test_a_solution_ends_in_the_sum_whatever_its_wording(first, second, digits):
    checker = Numeric(NumericSettings(spaced_digits=True))
    texts = {solution(first, second, num_digits=digits, rng=random.Random(seed)) for seed in range(20)}
    assert len(texts) > 1
    assert {checker.answer(text, id="") for text in texts} == {first + second}


def test_the_steps_are_those_of_the_hand():
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
