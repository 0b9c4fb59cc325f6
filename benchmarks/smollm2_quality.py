"""Draws an evaluation as a picture: block efficiency on MT-bench, GSM8K and HumanEval, by temperature, with 95 % intervals.

python benchmarks/smollm2_quality.py OUT/eval.json benchmarks/smollm2_quality.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafttrain.core.console import table
from drafttrain.eval.metrics import PromptCounts
from drafttrain.eval.page import write_picture
from drafttrain.eval.result import Result, read_result
from drafttrain.eval.slices import part_of
from drafttrain.eval.statistics import ratio_interval

OWN = ("gsm8k", "humaneval")
"""Domains of the evaluation; all others are categories of MT-bench."""


def main() -> None:
    """Draw the picture and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="eval.json")
    parser.add_argument("picture", type=Path, help="PNG file")
    arguments = parser.parse_args()
    result = read_result(arguments.result)
    rows = [
        [part.temperature, domain, name, ratio_interval(*part_of(prompts)).text(2)]
        for part in result.temperatures
        for name, figures in part.drafters.items()
        for domain, prompts in by_domain(figures.prompts).items()
    ]
    table(rows, columns=["temperature", "prompts", "drafter", "block efficiency"])
    columns = len(result.temperatures)
    write_picture(arguments.picture, lambda axes: draw(axes, result), columns=columns, height=3.4)


def by_domain(prompts: Sequence[PromptCounts]) -> dict[str, list[PromptCounts]]:
    """Return the counts of MT-bench, and of each other set."""
    found: dict[str, list[PromptCounts]] = {}
    for one in prompts:
        found.setdefault(one.domain if one.domain in OWN else "mt_bench", []).append(one)
    return found


def draw(axes: Sequence[Any], result: Result) -> None:
    """Draw a group of bars for each set of prompts."""
    for ax, part in zip(axes, result.temperatures, strict=True):
        width = 0.8 / len(part.drafters)
        for number, (name, figures) in enumerate(part.drafters.items()):
            groups = by_domain(figures.prompts)
            found = [ratio_interval(*part_of(prompts)) for prompts in groups.values()]
            reach = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
            places = [group + number * width for group in range(len(groups))]
            values = [one.value for one in found]
            ax.bar(places, values, width, yerr=reach, label=name, error_kw={"lw": 0.8})
        ax.set_xticks([group + 0.4 - width / 2 for group in range(len(groups))])
        ax.set_xticklabels([f"{name} ({len(prompts)})" for name, prompts in groups.items()], fontsize=8)
        ax.axhline(1, color="#888", lw=0.8)
        ax.set(ylabel="block efficiency", title=f"temperature {part.temperature:g}")
    axes[0].figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False
    )


if __name__ == "__main__":
    main()
