"""What a person reads of an evaluation on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.core.console import say, table


def interval(value: Mapping[str, float | None], digits: int = 2) -> str:
    """Return `2.71 [2.60, 2.82]`."""
    return f"{number(value['value'], digits)} [{number(value['low'], digits)}, {number(value['high'], digits)}]"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number in so many digits; `n/a` where there was nothing to count."""
    return "n/a" if value is None or value != value else f"{value:.{digits}f}"


def show(result: Mapping[str, Any]) -> None:
    """Print the figures of every drafter at every temperature, then comparisons and parity."""
    lossy = " (LOSSY)" if result["exactness"] == "lossy" else ""
    rows = []
    for part in result["temperatures"]:
        for name, figures in part["drafters"].items():
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
        for name, found in part["comparisons"].items():
            say(
                f"temperature {part['temperature']:g}: {name}: block efficiency {interval(found['block_efficiency'], 3)}, "
                f"paired over prompts (p = {found['p_value']:.3g})"
            )
        if "same_prompts" in part["plain"]:
            same = part["plain"]["same_prompts"]
            say(
                f"baselines on {same['num_prompts']} prompts: plain decoding {same['plain_tokens_per_second']:.0f} tokens/s, "
                f"transformers' generate {same['transformers_generate_tokens_per_second']:.0f} tokens/s"
            )
