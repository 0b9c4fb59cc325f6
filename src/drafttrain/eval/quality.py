"""What a lossy rule costs: agreement with the target's own output, and the score of a checkable task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.checkers import Checker
from drafttrain.eval.statistics import share_difference, share_interval


def agreement(own: Sequence[Generation], found: Sequence[Generation]) -> dict[str, Any]:
    """Return how far outputs are the target's own: outputs that are equal, and tokens before the first difference."""
    same = [float(list(a.tokens) == list(b.tokens)) for a, b in zip(own, found, strict=True)]
    before = [_common(a.tokens, b.tokens) for a, b in zip(own, found, strict=True)]
    lengths = [max(len(a.tokens), len(b.tokens)) for a, b in zip(own, found, strict=True)]
    return {
        "equal_outputs": share_interval(same, [1] * len(same)).json(),
        "tokens_before_difference": share_interval(before, lengths).json(),
    }


def solved(
    checker: Checker, tokenizer: Any, prompts: Sequence[Prompt], generations: Sequence[Generation]
) -> list[float]:
    """Return 1 for each prompt whose output solves it, else 0."""
    texts = [tokenizer.decode(list(one.tokens), skip_special_tokens=True) for one in generations]
    return [
        float(checker.correct(text, prompt.answer, id=prompt.id)) for prompt, text in zip(prompts, texts, strict=True)
    ]


def task_score(found: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """Return the share solved, and the difference to the target's own, paired over prompts."""
    return {
        "score": share_interval(found, [1] * len(found)).json(),
        "less_the_targets": share_difference(found, own).json(),
    }


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the tokens before two texts part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
