"""Finds where an output begins to repeat itself: repetitions are easy to draft and inflate every rate."""

from collections.abc import Sequence

NGRAM = 12


def tokens_before_repetition(tokens: Sequence[int], *, ngram: int = NGRAM) -> int:
    """Return the number of tokens before the output completes an n-gram for the second time.

    The token that completes it is not counted. An output without repetition counts whole.
    """
    seen: set[tuple[int, ...]] = set()
    for end in range(ngram, len(tokens) + 1):
        window = tuple(tokens[end - ngram : end])
        if window in seen:
            return end - 1
        seen.add(window)
    return len(tokens)
