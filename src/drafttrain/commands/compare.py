"""drafttrain compare: any number of drafters on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from drafttrain.commands.evaluate import evaluate_named, write_evaluation
from drafttrain.core.console import say
from drafttrain.core.errors import RecipeError
from drafttrain.eval.table import show_compared


def compare_drafters(
    drafters: Sequence[str],
    target: str | None,
    overrides: Sequence[str],
    *,
    prompts: str | None,
    out: Path,
    answers: Path | None,
) -> None:
    """Compare drafters, named A, B, C and so on, with each other and with the proposers of eval.beside.

    Args:
        target: The target; None: the first drafter's own.
        overrides: Overrides of the sections target and eval.
        prompts: A file of prompts; None: `eval.prompts`.
        out: Folder of eval.json and report.html.
        answers: Folder for the answers as Spec-Bench's files; None: they are not written.

    Raises:
        RecipeError: There is no drafter, or more than there are letters; one is named twice; two settings name prompts.
    """
    problems = [f"{one}: named twice" for one in dict.fromkeys(drafters) if drafters.count(one) > 1]
    if not 1 <= len(drafters) <= len(ascii_uppercase):
        problems.append(f"give 1 to {len(ascii_uppercase)} drafters, got {len(drafters)}")
    if prompts is not None and any(override.startswith("eval.prompts=") for override in overrides):
        problems.append("--prompts and eval.prompts both name prompts: remove one")
    if problems:
        raise RecipeError("arguments", problems)
    named = dict(zip(ascii_uppercase, drafters, strict=False))
    for letter, drafter in named.items():
        say(f"{letter}: {drafter}")
    of_prompts = [] if prompts is None else [f"eval.prompts={prompts}"]
    result = evaluate_named(named, target, [*overrides, *of_prompts], out=out, answers=answers)
    show_compared(result)
    title = ", ".join(f"{letter}: {drafter}" for letter, drafter in named.items())
    say(f"written: {write_evaluation(out, result, title=title)}{'' if answers is None else f', {answers}'}")
