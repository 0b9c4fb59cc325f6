"""The cost of a lossy rule, or of a tuned target: agreement with the outputs of the target as it is, and the score of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.checkers import Checker
from drafttrain.eval.interval import Interval
from drafttrain.eval.statistics import share_difference, share_interval, summed_by


class Output(Protocol):
    """The tokens that were written after a prompt."""

    @property
    def tokens(self) -> Sequence[int]:
        """The new tokens."""
        ...


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of a lossy rule equal the target's own."""

    equal_outputs: Interval
    """Share of outputs that are equal, token for token."""
    tokens_before_difference: Interval
    """Share of tokens before the first difference."""


@dataclass(frozen=True)
class TaskScore:
    """Share of prompts that the outputs solve."""

    score: Interval
    less_the_targets: Interval
    """The share, less that of the target's own outputs, paired over prompts."""


@dataclass(frozen=True)
class TunedFigures:
    """A tuned target less the original."""

    divergence: Interval
    """KL(original || tuned) at temperature 1, nats a token of the original's outputs."""
    agreement: Agreement | None = None
    """Of the greedy outputs; None: they were sampled."""
    task: TaskScore | None = None
    """Of the tuned target, and minus the original's; None: there is no checker."""


def agreement(own: Sequence[Output], found: Sequence[Output], units: Sequence[str]) -> Agreement:
    """Compare outputs with the target's own.

    Args:
        units: By output, what the intervals are over: a conversation has several outputs.
    """
    same = [float(list(a.tokens) == list(b.tokens)) for a, b in zip(own, found, strict=True)]
    before = [_common(a.tokens, b.tokens) for a, b in zip(own, found, strict=True)]
    lengths = [max(len(a.tokens), len(b.tokens)) for a, b in zip(own, found, strict=True)]
    outputs_U, same_U, before_U, lengths_U = summed_by(units, [1] * len(same), same, before, lengths)
    return Agreement(share_interval(same_U, outputs_U), share_interval(before_U, lengths_U))


def solved(checker: Checker, tokenizer: Any, prompts: Sequence[Prompt], generations: Sequence[Output]) -> list[float]:
    """Return 1 for every prompt that its output solves, else 0."""
    texts = [tokenizer.decode(list(one.tokens), skip_special_tokens=True) for one in generations]
    return [float(solves(checker, prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


def solves(checker: Checker, prompt: Prompt, text: str) -> bool:
    """Return whether a text solves a prompt.

    Raises:
        DataError: The prompt has no answer that can be compared.
    """
    try:
        return checker.correct(text, prompt.answer, id=prompt.id)
    except ValueError as error:
        raise DataError(f"eval.checker: prompt {prompt.id} has no answer that can be compared: {error}") from error


def task_score(found: Sequence[float], own: Sequence[float]) -> TaskScore:
    """Return the share of prompts solved, and the difference from the target's own share."""
    return TaskScore(share_interval(found, [1] * len(found)), share_difference(found, own).interval())


def tuning_in_words(figures: TunedFigures) -> Sequence[str]:
    """Return what the tuning costs, in sentences."""
    found = [f"the tuned target is {figures.divergence.text(4)} nats a token from the original (KL)"]
    if figures.agreement is not None:
        found.append(
            f"{figures.agreement.equal_outputs.value:.1%} of its greedy outputs equal the original's, and "
            f"{figures.agreement.tokens_before_difference.value:.1%} of the tokens come before the first difference"
        )
    if figures.task is not None:
        found.append(
            f"it solves {figures.task.score.value:.1%} of the prompts, minus the original's share: "
            f"{figures.task.less_the_targets.text(3)}, paired over prompts"
        )
    return found


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens before the first difference of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
