"""What a person reads of an evaluation on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.core.console import say, table

RELIABLE_PROMPTS = 8
"""Over fewer prompts an interval is printed with a word that it is not reliable."""


def interval(value: Mapping[str, float | None], digits: int = 2) -> str:
    """Return `2.71 [2.60, 2.82]`, and that the interval is not reliable where it is over fewer than 8 prompts."""
    return " ".join([number(value["value"], digits), *bounds(value, digits)])


def bounds(value: Mapping[str, float | None], digits: int = 2) -> list[str]:
    """Return the bounds of an interval in brackets, then what a reader must know of them, if anything."""
    # An eval.json of an earlier version does not hold the number of prompts.
    count = value.get("num_prompts")
    if value["low"] is None or value["low"] != value["low"]:
        return ["(no interval)" if count is None else f"(no interval, n = {count:g})"]
    found = [f"[{number(value['low'], digits)}, {number(value['high'], digits)}]"]
    return [*found, f"(not reliable, n = {count:g})"] if count is not None and count < RELIABLE_PROMPTS else found


def p_value(value: float | None) -> str:
    """Return `p = 0.012`; one prompt has none."""
    return "p n/a" if value is None or value != value else f"p = {value:.3g}"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number in so many digits; `n/a` where there was nothing to count."""
    return "n/a" if value is None or value != value else f"{value:.{digits}f}"


def show(result: Mapping[str, Any]) -> None:
    """Print the figures of every drafter at every temperature, then comparisons and parity."""
    rows = []
    for part in result["temperatures"]:
        for name, figures in part["drafters"].items():
            lossy = " (LOSSY)" if figures.get("exactness", result["exactness"]) == "lossy" else ""
            rows.append(
                [
                    f"{part['temperature']:g}",
                    name + lossy,
                    interval(figures["block_efficiency"]),
                    interval(figures["alpha"]),
                    number(figures["draft_acceptance_rate"]),
                    number(figures["mbsu"]),
                    f"{figures['tokens_per_second']['value']:.0f}",
                    interval(figures["speedup"]),
                ]
            )
    columns = ["temperature", "drafter", "block efficiency", "alpha", "draft acc. rate", "MBSU", "tokens/s", "speed-up"]
    length = result["settings"]["length"]
    draft = ", ".join(f"{key} {value}" for key, value in length.items())
    title = f"{result['num_prompts']} prompts, target {result['target']['name']}; {draft}; 95 % intervals over prompts"
    table(rows, columns=columns, title=title)
    for name, about in result["drafters"].items():
        if about["target"] != result["target"]["name"]:
            say(f"note: {name} decodes with {about['target']}: its parity and its speed-up are against that target")
    for part in result["temperatures"]:
        for name, figures in part["drafters"].items():
            if "parity" in figures:
                say(f"greedy parity of {name}: {figures['parity']['text']}")
            if "agreement" in figures:
                say(
                    f"LOSSY {name}: {figures['agreement']['equal_outputs']['value']:.1%} of the outputs are the target's own, "
                    f"{figures['agreement']['tokens_before_difference']['value']:.1%} of their tokens stand before a difference"
                )
            if "task" in figures:
                task = figures["task"]
                say(
                    f"temperature {part['temperature']:g}: {name}: {task['score']['value']:.1%} of the prompts solved; less the "
                    f"target's own: {interval(task['less_the_targets'], 3)}, paired"
                )
        for name, found in part["comparisons"].items():
            say(
                f"temperature {part['temperature']:g}: {name}: block efficiency {interval(found['block_efficiency'], 3)}, "
                f"paired over prompts ({p_value(found['p_value'])})"
                + (f"; speed {interval(found['speed'])} of the other's" if "speed" in found else "")
            )
        if "same_prompts" in part["plain"]:
            same = part["plain"]["same_prompts"]
            say(
                f"baselines on {same['num_prompts']} prompts: plain decoding {same['plain_tokens_per_second']:.0f} tokens/s, "
                f"transformers' generate {same['transformers_generate_tokens_per_second']:.0f} tokens/s"
            )
            if same["transformers_generate_equal"] < same["num_prompts"]:
                apart = (
                    "the others part at near ties"
                    if same["transformers_generate_comparable"]
                    else "so it is no baseline"
                )
                say(
                    f"transformers' generate writes the text of plain decoding in {same['transformers_generate_equal']} of "
                    f"{same['num_prompts']} prompts; {apart}"
                )
    for name, figures in result["head"]["held_out"].items() if "head" in result else ():
        say(
            f"head {result['head']['kind']}, {name}: log-likelihood {figures['log_likelihood']:.4f}, AUC {figures['auc']:.3f}, "
            f"ECE {figures['ece']:.4f} on {figures['count']:,} held-out draft tokens"
        )
