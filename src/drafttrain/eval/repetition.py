"""Where an output begins to repeat itself: a target that loops flatters every drafter."""

from collections.abc import Sequence

NGRAM = 12


def tokens_before_repetition(tokens: Sequence[int], *, ngram: int = NGRAM) -> int:
    """Return how many tokens come before an n-gram of the same output ends for the second time.

    That token completes the repetition and is not counted; an output without one counts whole.
    """
    seen: set[tuple[int, ...]] = set()
    for end in range(ngram, len(tokens) + 1):
        window = tuple(tokens[end - ngram : end])
        if window in seen:
            return end - 1
        seen.add(window)
    return len(tokens)
