"""What an evaluation prints."""

from __future__ import annotations

from drafttrain.core.console import say, table
from drafttrain.eval.interval import number, p_value
from drafttrain.eval.result import AtTemperature, DrafterFigures, HeadFigures, Result, SamePrompts


def show(result: Result) -> None:
    """Print the figures of every drafter at every temperature, then comparisons and parity."""
    columns = ["temperature", "drafter", "block efficiency", "alpha", "draft acc. rate", "MBSU", "tokens/s", "speed-up"]
    rows = [_row(part, name, figures) for part in result.temperatures for name, figures in part.drafters.items()]
    draft = ", ".join(f"{key} {value}" for key, value in result.settings["length"].items())
    title = f"{result.num_prompts} prompts, target {result.target.name}; {draft}; 95 % intervals over prompts"
    table(rows, columns=columns, title=title)
    for name, about in result.drafters.items():
        if about.target != result.target.name:
            say(f"note: {name} decodes with {about.target}: its parity and its speed-up are against that target")
    for part in result.temperatures:
        for name, figures in part.drafters.items():
            _show_quality(part, name, figures)
        _show_comparisons(part)
        if part.plain.same_prompts is not None:
            _show_baselines(part.plain.same_prompts)
    if result.head is not None:
        _show_head(result.head)


def _row(part: AtTemperature, name: str, figures: DrafterFigures) -> list[str]:
    return [
        f"{part.temperature:g}",
        name + (" (LOSSY)" if figures.lossy else ""),
        figures.block_efficiency.text(),
        figures.alpha.text(),
        number(figures.draft_acceptance_rate),
        number(figures.mbsu),
        f"{figures.tokens_per_second.value:.0f}",
        figures.speedup.text(),
    ]


def _show_quality(part: AtTemperature, name: str, figures: DrafterFigures) -> None:
    if figures.parity is not None:
        say(f"greedy parity of {name}: {figures.parity.text}")
    if figures.agreement is not None:
        say(
            f"LOSSY {name}: {figures.agreement.equal_outputs.value:.1%} of the outputs are the target's own, "
            f"{figures.agreement.tokens_before_difference.value:.1%} of their tokens stand before a difference"
        )
    if figures.task is not None:
        say(
            f"temperature {part.temperature:g}: {name}: {figures.task.score.value:.1%} of the prompts solved; less the "
            f"target's own: {figures.task.less_the_targets.text(3)}, paired"
        )


def _show_comparisons(part: AtTemperature) -> None:
    for name, found in part.comparisons.items():
        say(
            f"temperature {part.temperature:g}: {name}: block efficiency {found.block_efficiency.text(3)}, "
            f"paired over prompts ({p_value(found.p_value)})"
            + (f"; speed {found.speed.text()} of the other's" if found.speed else "")
        )


def _show_baselines(same: SamePrompts) -> None:
    say(
        f"baselines on {same.num_prompts} prompts: plain decoding {same.plain_tokens_per_second:.0f} tokens/s, "
        f"transformers' generate {same.transformers_generate_tokens_per_second:.0f} tokens/s"
    )
    if same.transformers_generate_equal < same.num_prompts:
        apart = "the others part at near ties" if same.transformers_generate_comparable else "so it is no baseline"
        say(
            f"transformers' generate writes the text of plain decoding in {same.transformers_generate_equal} of "
            f"{same.num_prompts} prompts; {apart}"
        )


def _show_head(head: HeadFigures) -> None:
    for name, figures in head.held_out.items():
        say(
            f"head {head.kind}, {name}: log-likelihood {figures.log_likelihood:.4f}, AUC {figures.auc:.3f}, "
            f"ECE {figures.ece:.4f} on {figures.count:,} held-out draft tokens"
        )
