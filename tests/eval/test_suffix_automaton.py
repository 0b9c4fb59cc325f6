"""The suffix automaton of prompt lookup against a search of the whole text, and its size."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from drafttrain.eval.proposers import suffix_automaton
from drafttrain.eval.proposers.suffix_automaton import SuffixAutomaton


def random_text(letters: int, *, size: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(letters) for _ in range(size)]


TEXTS = [
    *(random_text(letters, size=120, seed=seed) for letters in (1, 2, 3, 12) for seed in range(2)),
    [0, 1, 2] * 30,
    [*random_text(5, size=40, seed=7), *random_text(5, size=40, seed=7)],
]


def by_search(text: Sequence[int]) -> tuple[int, list[int]]:
    """Return the length of the longest match of a text's end, and the ends of all its earlier occurrences."""
    for length in range(len(text) - 1, 0, -1):
        end_of_text = list(text[len(text) - length :])
        if ends := [end for end in range(length, len(text)) if list(text[end - length : end]) == end_of_text]:
            return length, ends
    return 0, [0]


@pytest.mark.parametrize("text", TEXTS)
def test_it_finds_the_longest_match_at_one_of_its_places(text):
    automaton = SuffixAutomaton()
    for end in range(1, len(text) + 1):
        automaton.extend(text[end - 1 : end])
        length, ends = by_search(text[:end])
        assert automaton.match_length == length
        assert automaton.match_end in ends


@pytest.mark.parametrize("nested", [0, 10**9])
def test_with_all_nested_matches_stored_it_is_the_latest_place(nested, monkeypatch):
    """Control: with none stored it is the first place, which is another one."""
    monkeypatch.setattr(suffix_automaton, "NESTED", nested)
    others = 0
    for text in TEXTS:
        automaton = SuffixAutomaton()
        for end in range(1, len(text) + 1):
            automaton.extend(text[end - 1 : end])
            others += automaton.match_end != by_search(text[:end])[1][-1]
    assert (others == 0) == (nested > 0)


@pytest.mark.parametrize("text", [*TEXTS, [0] * 2000, random_text(2, size=2000, seed=1)])
def test_its_size_is_linear_in_the_text(text):
    automaton = SuffixAutomaton()
    automaton.extend(text)
    assert len(automaton._next) <= 2 * len(text)
    assert sum(map(len, automaton._next)) <= 3 * len(text)


def test_a_continuation_is_what_followed_the_match():
    automaton = SuffixAutomaton()
    automaton.extend([5, 1, 2, 9, 8, 7, 1, 2])
    assert automaton.continuation(3) == [9, 8, 7]
    assert automaton.continuation(9, least=2) == [9, 8, 7, 1, 2]
    assert automaton.continuation(3, least=3) == []
    automaton.extend([4])
    assert automaton.continuation(3) == [], "token 4 is new"
