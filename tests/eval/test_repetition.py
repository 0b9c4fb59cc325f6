"""Repetition is found where the second copy of an n-gram is complete."""

from drafttrain.eval.repetition import tokens_before_repetition


def test_the_count_stops_where_the_second_copy_is_complete() -> None:
    assert tokens_before_repetition(range(40), ngram=4) == 40
    # 0 1 2 3 4 | 0 1 2 3: the n-gram 0 1 2 3 ends again with the ninth token.
    assert tokens_before_repetition([0, 1, 2, 3, 4, 0, 1, 2, 3, 9], ngram=4) == 8
    assert tokens_before_repetition([7] * 20, ngram=4) == 4
    assert tokens_before_repetition([1, 2], ngram=4) == 2
