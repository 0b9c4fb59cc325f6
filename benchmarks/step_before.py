"""Compares a recipe's training step in two checkouts of this project, in turns: the time of a step, and whether losses stay equal.

Both train the same start on the same texts. The texts are random tokens, as long as the recipe's; the first 48 of each are a prompt.
The time is the processor time of one thread between the ends of optimizer steps, so other work on the machine matters little. The
ratio's interval is a bootstrap over pairs of turns.

    git worktree add /tmp/before 1e0117c
    python benchmarks/step_before.py /tmp/before --recipe tiny_eagle3
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PROMPT = 48
SKIPPED = 2
"""First steps of a turn that are not timed."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("--recipe", default="tiny_eagle3")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(turn(arguments.recipe, arguments.steps)))
        return
    seconds: list[tuple[float, float]] = []
    losses: dict[str, list[float]] = {}
    for pair in range(arguments.pairs):
        found = {}
        for name in ("before", "after")[:: 1 if pair % 2 else -1]:
            made = in_checkout(arguments.before if name == "before" else HERE, arguments)
            found[name] = statistics.median(made["seconds"])
            losses[name] = made["losses"]
        seconds.append((found["before"], found["after"]))
        print(f"pair {pair + 1}: {found['before']:.3f} s before, {found['after']:.3f} s after", file=sys.stderr)
    low, high = interval(seconds)
    before, after = (statistics.median(column) for column in zip(*seconds, strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses["after"], losses["before"], strict=True))
    print(
        "| recipe | before, s per step | after, s per step | before / after [95 %] | largest difference of a step's loss |"
    )
    print("|---|---|---|---|---|")
    print(
        f"| {arguments.recipe} | {before:.3f} | {after:.3f} | {ratio(seconds):.2f} [{low:.2f}, {high:.2f}] | {worst:.1e} |"
    )


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Return the sum of the times before divided by the sum after."""
    return sum(before for before, _ in pairs) / sum(after for _, after in pairs)


def interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the bootstrap interval of the ratio."""
    generator = random.Random(0)
    found = sorted(ratio(generator.choices(pairs, k=len(pairs))) for _ in range(2000))
    return found[50], found[-51]


def in_checkout(root: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the result of a turn with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(root), "--turn"]
    command += ["--recipe", arguments.recipe, "--steps", str(arguments.steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def turn(name: str, num_steps: int) -> dict[str, list[float]]:
    """Train some steps with the drafttrain that is imported here; return seconds and losses by step."""
    from dataclasses import replace

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from drafttrain.config.load import load_recipe
    from drafttrain.core.texts import Record
    from drafttrain.data_gen.packing import pack
    from drafttrain.drafters import drafters
    from drafttrain.losses import losses
    from drafttrain.target_model import Target
    from drafttrain.training.run import train

    recipe: Any = load_recipe(name)
    settings = replace(recipe.train, max_steps=num_steps, eval_every_steps=0, log_every_steps=1, loggers=["csv"])
    target = Target.load(recipe.target)
    torch.manual_seed(0)
    drafter = drafters.entry(recipe.drafter.kind).component.create(
        recipe.drafter, target=target, tokenizer=target.tokenizer
    )
    width = recipe.data.max_length

    def of_step(step: int) -> list[Any]:
        generator = torch.Generator().manual_seed(step)
        lengths = [width - (i % 4 == 3) * 10 * i for i in range(settings.batch_size)]
        texts = [torch.randint(1, target.num_tokens, (n,), generator=generator).tolist() for n in lengths]
        records = [Record(str(i), text, [j >= PROMPT for j in range(len(text))]) for i, text in enumerate(texts)]
        weight = float(sum(map(len, texts)) - PROMPT * len(texts))
        return [pack(records, width=width, weight_of_step=weight, step=step)[0]]

    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    with tempfile.TemporaryDirectory() as folder:
        train(
            drafter,
            losses.build(recipe.loss),
            target=target,
            of_step=of_step,
            estimate=None,
            settings=settings,
            vocab_size=target.num_tokens,
            folder=Path(folder),
        )
        with (Path(folder) / "metrics.csv").open(newline="") as file:
            logged = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
    hook.remove()
    each = [later - earlier for earlier, later in pairwise(ends)]
    return {"seconds": each[SKIPPED:], "losses": logged}


if __name__ == "__main__":
    main()
