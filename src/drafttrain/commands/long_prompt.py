"""drafttrain long-prompt: what the target loses when it keeps only a part of a prompt that a drafter chose. LOSSY."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.commands.named_drafters import evaluated_on, folders_of
from drafttrain.config.load import load_sections
from drafttrain.core.console import say, table
from drafttrain.core.files import write_json
from drafttrain.eval.interval import number, p_value
from drafttrain.eval.long_prompt.frontier import frontier
from drafttrain.eval.long_prompt.kept import Amount
from drafttrain.eval.long_prompt.result import LongPromptResult
from drafttrain.eval.long_prompt.settings import LongPromptSettings
from drafttrain.eval.page import label, write_picture
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.typed_json import to_json
from drafttrain.pipeline.preflight import check_drafters
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target

SECTION = "long_prompt"


def measure_long_prompts(
    drafter: str,
    target: str | None,
    overrides: Sequence[str],
    *,
    amounts: Sequence[Amount],
    prompts: str | None,
    out: Path,
) -> LongPromptResult:
    """Measure the choices of what to keep of a prompt, print them, and write long_prompt.json and long_prompt.png.

    Args:
        drafter: A local folder, a hub id or a builtin one. It must be a language model.
        target: The target; None: the drafter's own.
        overrides: Overrides of the sections target, eval and long_prompt.
        amounts: How much of each prompt is kept.
        prompts: A file of prompts, which are read whole; None: `eval.prompts`.
        out: Folder of the two files.

    Raises:
        RecipeError: The drafter, or an override, is wrong.
        CheckpointError: The drafter does not fit the target, or is no language model.
        DataError: A prompt is too short or too long.
    """
    quiet_libraries()
    of_target, evaluation, settings = load_sections(
        ["target", "eval"], overrides, further={SECTION: LongPromptSettings}
    )
    if prompts is not None:
        evaluation = replace(evaluation, prompts=prompts, prompt_tokens=None)
    (folder,) = folders_of([drafter])
    of_target = evaluated_on(of_target, folder, named=drafter, target=target, overrides=overrides)
    check_drafters(of_target, [str(folder)])
    loaded = Target.load(of_target)
    texts = read_prompts(
        evaluation.prompts,
        loaded.tokenizer,
        prompt_tokens=evaluation.prompt_tokens,
        limit=evaluation.num_prompts,
    )
    result = frontier(
        loaded, read_drafter(folder, loaded), texts, amounts, settings=settings, evaluation=evaluation, name=drafter
    )
    _show(result)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "long_prompt.json", to_json(result))
    write_picture(out / "long_prompt.png", lambda axes: _draw(axes, result), columns=2, rows=2, height=3.2)
    say(f"figures: {out / 'long_prompt.json'}, {out / 'long_prompt.png'}")
    return result


def _show(result: LongPromptResult) -> None:
    with_task = result.whole_task is not None
    rows = [
        [
            one.choice,
            one.of,
            one.amount,
            f"{one.kept_share:.2f}",
            one.tvd.text(3),
            one.recall.text(3),
            *([one.task.score.text(), one.task.less_the_targets.text()] if one.task is not None else []),
        ]
        for one in result.points
    ]
    columns = ["choice", "of", "keep", "kept share", "TVD to the whole prompt", "recall of attention"]
    columns += ["solved", "less the whole prompt's"] if with_task else []
    table(rows, columns=columns, title=f"\nLOSSY: {result.num_prompts} prompts, of which the target keeps a part")
    if result.whole_task is not None:
        say(f"with the whole prompt the target solves {result.whole_task}")
    rows = [
        [one.choice, one.baseline, one.amount, one.tvd.text(3), p_value(one.tvd.p_value), one.recall.text(3)]
        for one in result.differences
    ]
    columns = ["choice", "less", "keep", "TVD", "", "recall of attention"]
    table(rows, columns=columns, title="\nDifferences, paired over prompts (a TVD below 0 is better)")


def _draw(axes: Sequence[Any], result: LongPromptResult) -> None:
    """Draw TVD and recall against the kept share: choices of keys above, of tokens below."""
    for row, of in enumerate(("keys", "tokens")):
        points = [one for one in result.points if one.of == of]
        for ax, name in zip(axes[2 * row : 2 * row + 2], ("tvd", "recall"), strict=True):
            for choice in dict.fromkeys(one.choice for one in points):
                own = sorted((one for one in points if one.choice == choice), key=lambda one: one.kept_share)
                values = [getattr(one, name) for one in own]
                reach = [[one.value - one.low for one in values], [one.high - one.value for one in values]]
                ax.errorbar(
                    [one.kept_share for one in own],
                    [one.value for one in values],
                    yerr=None if any(number(one.low) == "n/a" for one in values) else reach,
                    marker="o",
                    ms=3,
                    capsize=2,
                    lw=1,
                    label=label(choice),
                )
            ax.set(xlabel=f"kept share of the prompt's {of}", ylabel={"tvd": "TVD"}.get(name, "recall of attention"))
            if points:
                ax.legend(fontsize=6, frameon=False)
    for ax in axes:
        ax.set_title("LOSSY: target with a part of the prompt", fontsize=8)
