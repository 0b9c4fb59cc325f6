"""Compares exit layers of Kangaroo in one table: one adapter for each layer, with the same texts, steps and prompts.

    python benchmarks/exit_layers.py recipes/tiny_kangaroo.yaml --layers 1,2,3 [train.max_steps=100 ...]

Each layer has its own run under --runs. If the command is run again, the runs are resumed. The target generates its texts once.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from drafttrain.config.load import load_recipe
from drafttrain.eval.interval import Interval
from drafttrain.eval.result import DrafterFigures, Result, read_result


def main() -> None:
    """Run the recipe for every layer and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--layers", required=True, help="exit layers, as in 1,2,3")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all layers")
    arguments = parser.parse_intermixed_args()
    layers = [int(layer) for layer in arguments.layers.split(",")]
    name = load_recipe(arguments.recipe, arguments.overrides).name
    results: dict[int, Result] = {}
    texts: Path | None = None
    for layer in layers:
        run = arguments.runs / f"{name}_exit{layer}"
        generated = run / "data" / "generated"
        if texts is not None and texts.exists() and not generated.exists():
            shutil.copytree(texts, generated)
        own = [*arguments.overrides, f"name={run.name}", f"drafter.exit_layer={layer}", "export.require={}"]
        command = [sys.executable, "-m", "drafttrain", "fit", arguments.recipe, *own, "--runs", str(arguments.runs)]
        subprocess.run(command, check=True)
        texts = generated
        results[layer] = read_result(run / "eval.json")
    print(table(results))


def table(results: dict[int, Result]) -> str:
    """Return the figures by layer and temperature; `start` is the raw exit of the same layer."""
    some = next(iter(results.values()))
    length = ", ".join(f"{key} {value}" for key, value in some.settings["length"].items())
    lines = [
        f"{some.num_prompts} prompts, {length}, 95 % intervals over prompts, "
        f"{some.drafters['drafter'].parameters:,} parameters trained for each layer",
        "",
        "| temperature | exit layer | block efficiency | gain over the raw exit, paired | alpha | MBSU |",
        "|---|---|---|---|---|---|",
    ]
    for number, part in enumerate(some.temperatures):
        for layer, result in results.items():
            here = result.temperatures[number]
            figures, gain = here.drafters["drafter"], here.comparisons["drafter - start"].block_efficiency
            lines.append(
                f"| {part.temperature:g} | {layer} | {figures.block_efficiency.text()} | {gain.text()} "
                f"| {figures.alpha.text()} | {_mbsu(figures).text()} |"
            )
    lines += ["", "The interval of MBSU is that of block efficiency, at the bytes of the mean round."]
    return "\n".join(lines)


def _mbsu(figures: DrafterFigures) -> Interval:
    tau = figures.block_efficiency
    scale = figures.mbsu / tau.value
    return Interval(scale * tau.value, scale * tau.low, scale * tau.high, tau.num_prompts)


if __name__ == "__main__":
    main()
