"""Compares training steps on packed chats with the same steps on one chat a row, in turns, on this machine.

A step reads the records of an optimizer step of the recipe's batch size: target, drafter, loss, backward, update. Both arms read the
same records. Tokenizing and packing are not timed. Times are
CPU seconds of the process, which runs one thread: other work on the machine matters less to them. Memory is not measured.

    python benchmarks/packing.py --chats alpaca_en_demo.json --recipe demo

The chats are any file that a source of kind jsonl reads; the recipe gives target, drafter, loss and batch size.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.provenance import commit, processor
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen import packing
from drafttrain.data_gen.training_data import TrainingData, prepare
from drafttrain.drafters import drafters
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.target_model import Target
from drafttrain.training.optimizer import build_optimizer

FORMS = ("packed", "one a row")


class Arm:
    """A drafter in training and its optimizer."""

    def __init__(self, drafter, recipe, target: Target) -> None:
        self.drafter = drafter.train()
        self.loss = losses.build(recipe.loss)
        self.target = target
        self.optimizer = build_optimizer(drafter, recipe.train)

    def step(self, batch: DraftBatch) -> tuple[float, float]:
        """Take one step; return its CPU seconds and its loss."""
        began = time.process_time()
        batch = with_plan(self.drafter, self.loss, batch)
        needs = self.drafter.needs() | TargetNeeds(final=self.loss.needs_target)
        if needs != TargetNeeds():
            seen = self.target.read(batch.tokens_BT, batch.positions_BT, needs, documents=batch.packed_documents)
            rows = self.target.rows_of(seen) if self.loss.needs_target else None
            batch = replace(batch, target=seen, target_rows=rows)
        made = batch_loss(self.drafter, self.loss, batch, vocab_size=self.target.num_tokens)
        (made.total / batch.weight_of_step).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.end_of_step()
        return time.process_time() - began, float(made.total.detach()) / batch.weight_of_step


def one_a_row(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Return a row for each record."""
    return [[number] for number in range(len(lengths))]


def batch_of(data: TrainingData, step: int, *, form: str, batch_size: int) -> DraftBatch:
    """Return the whole step as one micro-batch."""
    with mock.patch.object(packing, "plan", packing.plan if form == "packed" else one_a_row):
        (batch,) = data.of_step(step, batch_size=batch_size)
    return batch


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", required=True, help="file that a source of kind jsonl reads")
    parser.add_argument("--recipe", nargs="+", default=["demo", "tiny_eagle3"])
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name, arguments) for name in arguments.recipe]
    print(
        f"{arguments.pairs} pairs of a step with {arguments.batch_size} chats of {Path(arguments.chats).name}, "
        f"at most {arguments.max_length} tokens, one thread, {processor()}, commit {commit()}\n"
    )
    print(
        "| recipe | tokens of the rows, packed | one chat a row | samples per CPU second, packed | one chat a row | ratio [95 % interval] | "
        "largest difference of the loss |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def measured(name: str, arguments: argparse.Namespace) -> str:
    """Return the row of a recipe."""
    source = f"{{kind: jsonl, path: {arguments.chats}}}"
    recipe = load_recipe(
        name,
        [
            f"data.sources=[{source}]",
            f"data.max_length={arguments.max_length}",
            "data.generate=null",
            "data.cache=none",
        ],
    )
    target = Target.load(recipe.target)
    torch.manual_seed(0)
    component = drafters.entry(recipe.drafter.kind).component
    start = component.for_training(recipe.drafter, target=target, tokenizer=target.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(recipe.data, Path(folder), tokenizer=target.tokenizer, tokenizer_fingerprint="", seed=0)
        start.fit_vocabulary(data.label_counts)
        arms = {form: Arm(copy.deepcopy(start), recipe, target) for form in FORMS}
        seconds, apart = {form: [0.0] * arguments.pairs for form in FORMS}, 0.0
        size = arguments.batch_size
        for form in FORMS:
            arms[form].step(batch_of(data, arguments.pairs, form=form, batch_size=size))
        for pair in range(arguments.pairs):
            found = {}
            for form in FORMS if pair % 2 else FORMS[::-1]:
                batch = batch_of(data, pair, form=form, batch_size=size)
                seconds[form][pair], found[form] = arms[form].step(batch)
            apart = max(apart, abs(found["packed"] - found["one a row"]))
        filled = data.filled(batch_size=size, records_per_device=None, world_size=1, multiple=1)
    records = [float(size)] * arguments.pairs
    ratio = ratio_of_ratios((records, seconds["packed"]), (records, seconds["one a row"]))
    rates = [size * arguments.pairs / sum(seconds[form]) for form in FORMS]
    return f"| {recipe.name} | {filled[0]:.0%} | {filled[1]:.0%} | {rates[0]:.2f} | {rates[1]:.2f} | {ratio} | {apart:.1e} |"


if __name__ == "__main__":
    main()
