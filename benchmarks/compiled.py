"""Compares a training step under train.compile with the same step without it, in turns, on this machine.

A step is forward, loss, backward and optimizer step of a recipe's drafter on its own target, on rows of random tokens of the
recipe's full length. The target runs once, before the steps, and is not compiled. A turn is several steps. The compilation is timed
separately.

    python benchmarks/compiled.py --recipe tiny_eagle3
"""

import argparse
import copy
import time
from dataclasses import replace
from typing import Any

import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.provenance import commit, processor
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.losses import losses
from drafttrain.losses.align import planned
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from drafttrain.training.compiled import compile_step
from drafttrain.training.optimizer import build_optimizer


class Arm:
    """A drafter in training, compiled or not."""

    def __init__(self, drafter: Any, recipe: Any, target: Target) -> None:
        self.drafter = drafter.train()
        self.loss = losses.build(recipe.loss)
        self.vocab_size = target.num_tokens
        self.optimizer = build_optimizer(drafter, recipe.train)
        self.last = 0.0

    def step(self, batch: DraftBatch) -> None:
        """Take one step."""
        made = batch_loss(self.drafter, self.loss, batch, vocab_size=self.vocab_size)
        total = made.total / batch.weight_of_step
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.end_of_step()
        self.last = float(total.detach())

    def turn(self, batches: list[DraftBatch]) -> float:
        """Return the seconds of a step for each batch."""
        began = time.perf_counter()
        for batch in batches:
            self.step(batch)
        return time.perf_counter() - began


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny_eagle3")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    target = Target.load(recipe.target)
    torch.manual_seed(0)
    component: Any = drafters.entry(recipe.drafter.kind).component
    start = component.create(recipe.drafter, target=target, tokenizer=target.tokenizer)
    needs = start.needs() | TargetNeeds(final=True)
    length, batches = recipe.data.max_length, []
    for number in range(arguments.steps):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, target.num_tokens, (arguments.rows, length), generator=generator).tolist()
        records = [Record("", row, [False] * (length // 8) + [True] * (length - length // 8)) for row in tokens]
        weight = float(sum(sum(record.loss_mask) for record in records))
        batch, _ = pack(records, width=length, weight_of_step=weight, step=number)
        batch = planned(batch, start.rows_asked(), slots=start.reads_slots)
        seen = target.read(batch.tokens_BT, batch.positions_BT, needs)
        batches.append(replace(batch, target=seen, target_rows=target.rows_of(seen)))
    arms = {name: Arm(copy.deepcopy(start), recipe, target) for name in ("plain", "compiled")}
    compile_step(arms["compiled"].drafter, arms["compiled"].loss)
    first = {name: arm.turn(batches) for name, arm in arms.items()}
    losses_1 = {name: arm.last for name, arm in arms.items()}
    times: dict[str, list[float]] = {"plain": [], "compiled": []}
    for pair in range(arguments.pairs):
        for name in ("plain", "compiled") if pair % 2 else ("compiled", "plain"):
            times[name].append(arms[name].turn(batches))
    ones = [1.0] * arguments.pairs
    ratio = ratio_of_ratios((times["plain"], ones), (times["compiled"], ones))
    step = {name: 1000 * sum(taken) / (arguments.pairs * arguments.steps) for name, taken in times.items()}
    print(
        f"{arguments.pairs} pairs of {arguments.steps} steps, recipe {recipe.name}, {arguments.rows} rows of {length} tokens, "
        f"{arguments.threads} threads, {processor()}, commit {commit()}\n"
    )
    print(
        "| step | step compiled | plain / compiled [95 % interval] | first turn, compilation included | loss after it |"
    )
    print("|---|---|---|---|---|")
    print(
        f"| {step['plain']:.0f} ms | {step['compiled']:.0f} ms | {ratio} | {first['plain']:.1f} s and {first['compiled']:.1f} s | "
        f"{losses_1['plain']:.6f} and {losses_1['compiled']:.6f} |"
    )


if __name__ == "__main__":
    main()
