"""Compares TVD++ with cross-entropy: same start, records and number of steps, both learning rates tuned on one grid.

Every arm is the demo with another loss and learning rate. For each loss the rate is chosen whose drafter has the highest block
efficiency by replay on the validation prompts at temperature 1. The two chosen drafters are compared in pairs on the test prompts.

    python benchmarks/demo_losses.py runs/demo_losses
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.provenance import commit, processor
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Result
from drafttrain.pipeline.data import contaminated_prompts
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.training.result import TrainResult

LOSSES = ("tvdpp", "ce")


def main() -> None:
    """Train all arms, evaluate the best two, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--prompts", type=int, default=None, help="number of test prompts; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = load_recipe(arguments.recipe, arguments.overrides)
    gen(base, arguments.folder / "base")
    best: dict[str, tuple[float, float, Path]] = {}
    print("| loss | lr | best step | block efficiency by replay, validation, temperature 1 |\n|---|---|---|---|")
    for loss in LOSSES:
        for rate in arguments.rates:
            done, drafter = arm(arguments, loss, rate)
            found = done.best
            print(f"| {loss} | {rate:g} | {done.best_step} | {found:.3f} |", flush=True)
            best[loss] = max(best.get(loss, (0.0, 0.0, drafter)), (found, rate, drafter))
    run = DrafterRun(base, arguments.folder / "base")
    dropped = contaminated_prompts(run, base.eval.prompts)
    prompts = read_prompts(
        base.eval.prompts,
        run.tokenizer,
        prompt_tokens=base.eval.prompt_tokens,
        dropped=dropped,
        limit=arguments.prompts,
    )
    folders = {loss: path for loss, (_, _, path) in best.items()}
    settings = replace(base.eval, num_prompts=None, speed_prompts=0, temperatures=[0.0, 1.0])
    result = evaluate(folders, run.target, prompts, settings)
    show(result, {loss: rate for loss, (_, rate, _) in best.items()})
    print(f"\n{len(prompts)} test prompts, {processor()}, commit {commit()}")


def arm(arguments: Any, loss: str, rate: float) -> tuple[TrainResult, Path]:
    """Train one arm, or load it from an earlier call; return its training result and the folder of the exported best step."""
    changes = [f"loss.kind={loss}", f"train.lr={rate:g}", "eval.temperatures=[1.0]", f"name={loss}-{rate:g}"]
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *changes])
    folder = arguments.folder / recipe.name
    if not (folder / "data").exists():
        shutil.copytree(arguments.folder / "base" / "data", folder / "data")
    run = DrafterRun(recipe, folder)
    run.train()
    return run.export_best(), run.folder.drafter


def show(result: Result, rates: dict[str, float]) -> None:
    """Print the comparison."""
    print("\n| temperature | tvdpp | ce | tvdpp - ce, paired | p |\n|---|---|---|---|---|")
    for part in result.temperatures:
        cells = [f"{part.drafters[loss].block_efficiency.text()} (lr {rates[loss]:g})" for loss in LOSSES]
        (found,) = part.comparisons.values()
        difference = found.block_efficiency.text(3)
        print(f"| {part.temperature:g} | {cells[0]} | {cells[1]} | {difference} | {found.p_value:.2g} |")


if __name__ == "__main__":
    main()
