"""Texts that are read together are bounded by tokens, whatever their lengths."""

import random

import pytest

from drafttrain.data_gen.groups import TOKENS_STORED, TOKENS_STORED_ON_CPU, groups, groups_in_order


@pytest.mark.parametrize("tokens", [1, 100, 16_384])
def test_a_group_holds_at_most_so_many_tokens_or_one_text(tokens: int) -> None:
    draws = random.Random(0)
    lengths = [draws.choice([1, 7, 60, 900, 5000]) for _ in range(200)]
    found = groups(lengths, tokens=tokens)
    assert sorted(number for group in found for number in group) == list(range(len(lengths)))
    for group in found:
        longest = max(lengths[number] for number in group)
        assert len(group) == 1 or len(group) * longest <= tokens


def test_texts_of_like_length_are_read_together_the_longest_first() -> None:
    assert groups([3, 9, 2, 10], tokens=20) == [[3, 1], [0, 2]]
    assert groups([], tokens=20) == []


def test_groups_in_order_are_consecutive_and_bounded_by_the_tokens_of_their_texts() -> None:
    assert groups_in_order([3, 7, 1, 20, 10, 1], tokens=10) == [[0, 1], [2], [3], [4], [5]]
    assert groups_in_order([], tokens=10) == []
    assert (TOKENS_STORED, TOKENS_STORED_ON_CPU) == (4096, 1024), (
        "another number moves the logits of caches by rounding"
    )
