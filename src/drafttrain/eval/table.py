"""What an evaluation prints: a table of what carries over to other machines, and one of what was measured on this one."""

from __future__ import annotations

from drafttrain.core.console import say, table
from drafttrain.eval.compared import (
    ARM_CAPTION,
    ARM_COLUMNS,
    PAIR_CAPTION,
    PAIR_COLUMNS,
    arm_rows,
    compared_slice_rows,
    pair_rows,
)
from drafttrain.eval.interval import RELIABLE_PROMPTS, Interval, number
from drafttrain.eval.quality import tuning_in_words
from drafttrain.eval.result import AtTemperature, DrafterFigures, HeadFigures, PlainFigures, Result

CARRIES_OVER = "What carries over to a GPU"
CARRIES_OVER_CAPTION = "counts of tokens, calls and bytes, the same on any machine"
THIS_MACHINE = "On this machine"
THIS_MACHINE_CAPTION = "measured times; speed-up is over the baseline on the same prompts"
COUNTED_COLUMNS = ("temperature", "drafter", "block efficiency", "alpha", "draft acc. rate", "MBSU", "greedy parity")
ROUND_CAPTION = (
    "Milliseconds of a mean round on this machine: forwards of target and drafter, and the rest of each phase"
)
ROUND_COLUMNS = ("temperature", "drafter", "round", "target", "drafter's", "rest of drafting", "rest of verification")
SIGNIFICANT = 0.05
"""Differences by slice up to this corrected p-value are printed; the page has all."""
TIMED_COLUMNS = ("temperature", "drafter", "tokens/s", "speed-up", "baseline")


def show(result: Result) -> None:
    """Print the tables of counts and of times, then what needs a sentence."""
    length, machine = drafting_in_words(result), result.provenance.machine
    about = f"{result.num_prompts} prompts, target {target_in_words(result)}; {length}; brackets: 95 % intervals over prompts"
    rows = [_counted_row(part, *arm) for part in result.temperatures for arm in part.drafters.items()]
    table(rows, columns=COUNTED_COLUMNS, title=f"\n{CARRIES_OVER}: {CARRIES_OVER_CAPTION}\n{about}")
    rows = [row for part in result.temperatures for row in _timed_rows(part)]
    where = f"{THIS_MACHINE} ({machine.processor}, {machine.cpus} CPUs)"
    table(rows, columns=TIMED_COLUMNS, title=f"\n{where}: {THIS_MACHINE_CAPTION}")
    rows = [row for part in result.temperatures for row in round_rows(part)]
    table(rows, columns=ROUND_COLUMNS, title=f"\n{ROUND_CAPTION}")
    _show_slices(result)
    _show_pairs(result)
    _show_notes(result)


def show_compared(result: Result) -> None:
    """Print the table of all drafters, every pair, the slices of the prompts, and what needs a sentence."""
    about = f"{result.num_prompts} prompts, target {target_in_words(result)}; brackets: 95 % intervals over prompts"
    rows = [row for part in result.temperatures for row in arm_rows(part)]
    table(rows, columns=ARM_COLUMNS, title=f"\n{ARM_CAPTION}\n{about}")
    _show_pairs(result)
    _show_slices(result)
    for part in result.temperatures:
        for temperature, pair, axis, name, difference, _, holm in compared_slice_rows(part, below=SIGNIFICANT):
            say(f"temperature {temperature}: {pair} on {axis} {name}: {difference} (Holm p = {holm})")
    _show_notes(result)


def _show_pairs(result: Result) -> None:
    if rows := [row for part in result.temperatures for row in pair_rows(part)]:
        table(rows, columns=PAIR_COLUMNS, title=f"\n{PAIR_CAPTION}")


def _show_slices(result: Result) -> None:
    """Print a table for each axis on which the prompts differ."""
    for part in result.temperatures:
        for axis in slice_axes(part):
            columns = (axis, "prompts", *part.drafters)
            table(slice_rows(part, axis), columns=columns, title=f"\n{slice_caption(part, axis)}")


def _show_notes(result: Result) -> None:
    """Print what needs a sentence: other targets, differences, lossy rules, heads."""
    for name, drafter in result.drafters.items():
        if drafter.target != result.target.name:
            say(f"note: {name} decodes with {drafter.target}: its parity and its speed-up are against that target")
    for part in result.temperatures:
        for name, figures in part.drafters.items():
            _show_quality(part, name, figures)
        for name, tuned in (part.tuned or {}).items():
            for sentence in tuning_in_words(tuned):
                say(f"temperature {part.temperature:g}, {name}: {sentence}")
        _show_baselines(part.plain)
    if result.head is not None:
        _show_head(result.head)


def target_in_words(result: Result) -> str:
    """Return the name of the target, with the type of its weights where it is known."""
    return f"{result.target.name} in {result.target.dtype}" if result.target.dtype else result.target.name


def drafting_in_words(result: Result) -> str:
    """Return in one line how was drafted: the length policy, and what changes the rounds."""
    return ", ".join(f"{key} {value}" for key, value in (result.settings["length"] | result.changed_rounds).items())


def alpha_cell(figures: DrafterFigures) -> str:
    """Return alpha; `-` for a training-free proposer, which has no distribution."""
    return "-" if figures.alpha is None else figures.alpha.text()


def parity_cell(figures: DrafterFigures) -> str:
    """Return the greedy parity of a drafter; `-` where it is not defined: sampled text, or a lossy rule."""
    return "-" if figures.parity is None else figures.parity.short()


def round_rows(part: AtTemperature) -> list[list[str]]:
    """Return the times of a mean round by part: of plain decoding, then of every drafter; none in older results."""
    times = {"plain decoding": part.plain.round, **{name: one.round for name, one in part.drafters.items()}}
    return [
        [
            f"{part.temperature:g}",
            name,
            *(number(ms, 1) for ms in (one.total_ms, one.target_ms, one.drafter_ms, one.drafting_ms, one.verifying_ms)),
        ]
        for name, one in times.items()
        if one is not None
    ]


def slice_axes(part: AtTemperature) -> list[str]:
    """Return the axes on which the prompts differ."""
    return list(next(iter(part.drafters.values())).slices)


def slice_caption(part: AtTemperature, axis: str) -> str:
    """Return the title of the table of an axis."""
    note = f"; *: fewer than {RELIABLE_PROMPTS} prompts, the interval is not reliable"
    return f"Block efficiency by {axis} of the prompts, temperature {part.temperature:g}{note}"


def slice_rows(part: AtTemperature, axis: str) -> list[list[str]]:
    """Return a row for each slice: its prompts, and the block efficiency of every drafter; none where all are alike."""
    by_drafter = [figures.slices.get(axis, {}) for figures in part.drafters.values()]
    return [
        [name or "(none)", str(found.num_prompts), *(_with_mark(slices[name]) for slices in by_drafter)]
        for name, found in by_drafter[0].items()
    ]


def _with_mark(found: Interval) -> str:
    """Return a value with its bounds, and a mark instead of the note on their reliability."""
    mark = "*" if found.num_prompts is not None and found.num_prompts < RELIABLE_PROMPTS else ""
    return " ".join([number(found.value), found.bounds()[0]]) + mark


def _counted_row(part: AtTemperature, name: str, figures: DrafterFigures) -> list[str]:
    return [
        f"{part.temperature:g}",
        name + (" (LOSSY)" if figures.lossy else ""),
        figures.block_efficiency.text(),
        alpha_cell(figures),
        number(figures.draft_acceptance_rate),
        number(figures.mbsu),
        parity_cell(figures),
    ]


def _timed_rows(part: AtTemperature) -> list[list[str]]:
    """Return the speeds of the drafters at one temperature, then those of the baselines."""
    temperature = f"{part.temperature:g}"
    rows = [
        [
            temperature,
            name + (" (LOSSY)" if figures.lossy else ""),
            f"{figures.tokens_per_second.value:.0f}",
            figures.speedup.text(),
            figures.speedup.baseline,
        ]
        for name, figures in part.drafters.items()
    ]
    return rows + [[temperature, name, f"{speed:.0f}", "-", "-"] for name, speed in baseline_speeds(part.plain)]


def baseline_speeds(plain: PlainFigures) -> list[tuple[str, float]]:
    """Return the tokens per second of decoding without a drafter, by name."""
    found = [("plain decoding", plain.tokens_per_second)]
    if (same := plain.same_prompts) is not None:
        on = f"first {same.num_prompts} prompts"
        found.append((f"plain decoding, {on}", same.plain_tokens_per_second))
        found.append((f"transformers' generate, {on}", same.transformers_generate_tokens_per_second))
    return found


def _show_quality(part: AtTemperature, name: str, figures: DrafterFigures) -> None:
    if figures.parity is not None and not figures.parity.exact:
        say(f"greedy parity of {name}: {figures.parity.text}")
    if figures.alpha_bound is not None:
        say(
            f"temperature {part.temperature:g}: the vocabulary of {name} holds {figures.alpha_bound:.1%} of the target's probability on "
            f"these outputs, so alpha is at most {figures.alpha_bound:.3f}"
        )
    if figures.agreement is not None:
        say(
            f"LOSSY {name}: {figures.agreement.equal_outputs.value:.1%} of the outputs equal the target's own; "
            f"{figures.agreement.tokens_before_difference.value:.1%} of the tokens come before the first difference"
        )
    if figures.task is not None:
        say(
            f"temperature {part.temperature:g}: {name} solves {figures.task.score.value:.1%} of the prompts; minus the "
            f"target's own share: {figures.task.less_the_targets.text(3)}, paired over prompts"
        )


def _show_baselines(plain: PlainFigures) -> None:
    same = plain.same_prompts
    if same is not None and same.transformers_generate_equal < same.num_prompts:
        others = (
            "the others differ at near ties"
            if same.transformers_generate_comparable
            else "so it does not count as a baseline"
        )
        say(
            "transformers' generate writes the same text as plain decoding for "
            f"{same.transformers_generate_equal} of {same.num_prompts} prompts; {others}"
        )


def _show_head(head: HeadFigures) -> None:
    for name, figures in head.held_out.items():
        say(
            f"head {head.kind}, {name}: log-likelihood {figures.log_likelihood:.4f}, AUC {figures.auc:.3f}, "
            f"ECE {figures.ece:.4f} on {figures.count:,} held-out draft tokens"
        )
