"""Measures the overhead of a step of `fit` over its arithmetic: the trainer against a bare PyTorch loop, in turns.

Both train the same start on the same batches with the same loss and the same optimizer. The bare loop has its batches ready
and nothing else around it: no trainer, no packing, no logs, no acceptance rate. A turn is a few steps of one of them. Its time
is that between the ends of optimizer steps.

    python benchmarks/step_overhead.py runs/demo
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_ends import step_ends

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.provenance import commit, processor
from drafttrain.drafters import drafters
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.pieces import PIECE_BYTES
from drafttrain.pipeline.data import training_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.training.optimizer import build_optimizer, learning_rate_scale
from drafttrain.training.run import train


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder; its data are generated if they are missing")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("overrides", nargs="*", help="loss.kind=tvd")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per turn")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    gen(recipe, arguments.run)
    run = DrafterRun(recipe, arguments.run)
    data = training_data(run)
    settings = replace(recipe.train, max_steps=arguments.steps + 2, eval_every_steps=0, loggers=["csv"])
    start = drafters.entry(recipe.drafter.kind).component.create(
        recipe.drafter, target=run.target, tokenizer=run.tokenizer
    )
    size = {"batch_size": settings.batch_size, "records_per_device": settings.records_per_device}
    ready = [data.of_step(step, **size) for step in range(settings.max_steps)]

    def fit_turn() -> float:
        def of_step(step: int) -> list[DraftBatch]:
            return data.of_step(step, **size)

        with tempfile.TemporaryDirectory() as folder, step_ends(time.process_time) as ends:
            train(
                copy.deepcopy(start),
                losses.build(recipe.loss),
                target=run.target,
                of_step=of_step,
                estimate=None,
                settings=settings,
                vocab_size=run.target.num_tokens,
                folder=Path(folder),
            )
        assert len(ends) == settings.max_steps, "one end a step"
        return ends[-1] - ends[-1 - arguments.steps]

    def bare_turn() -> float:
        return bare(copy.deepcopy(start), losses.build(recipe.loss), ready, settings, run.target.num_tokens, arguments)

    turns: dict[str, Callable[[], float]] = {"fit": fit_turn, "bare": bare_turn}
    times: dict[str, list[float]] = {"fit": [], "bare": []}
    for pair in range(arguments.pairs + 1):
        for name in ("fit", "bare") if pair % 2 else ("bare", "fit"):
            seconds = turns[name]()
            if pair:  # the first pair warms up
                times[name].append(seconds)
    ones = [1.0] * arguments.pairs
    ratio = ratio_of_ratios((times["fit"], ones), (times["bare"], ones))
    per_step = {name: 1000 * sum(seconds) / (arguments.pairs * arguments.steps) for name, seconds in times.items()}
    print(
        f"{arguments.pairs} pairs of {arguments.steps} steps, recipe {recipe.name}, {arguments.threads} threads, ",
        end="",
    )
    print(f"{processor()}, commit {commit()}\n")
    print("| step of fit | step of the bare loop | ratio [95 % interval] |\n|---|---|---|")
    print(f"| {per_step['fit']:.0f} ms | {per_step['bare']:.0f} ms | {ratio} |")


def bare(
    drafter: Any, loss: Any, ready: list[list[DraftBatch]], settings: Any, vocab_size: int, arguments: Any
) -> float:
    """Return the seconds of the last steps of a plain loop."""
    optimizer = build_optimizer(drafter, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, settings))
    piece = PIECE_BYTES.on_cpu // (4 * vocab_size)
    drafter.train()
    began = 0.0
    for step, batches in enumerate(ready):
        if step == len(ready) - arguments.steps:
            began = time.process_time()
        for batch in batches:
            drafted = drafter(batch)
            rows = align(drafted, batch)
            states_RD = drafted.states_BTD[1].flatten(0, 1)
            parts = []
            for first in range(0, len(rows.tokens_N), piece):
                chosen = slice(first, first + piece)
                parts.append(
                    loss.per_row(
                        LossRows(
                            drafter_logits_NV=drafted.head(states_RD[rows.drafter_N[chosen]], 1)[:, :vocab_size],
                            target_logits_NV=batch.target_rows.at(rows.target_N[chosen])[:, :vocab_size],
                            tokens_N=rows.tokens_N[chosen],
                        )
                    )
                )
            values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            (loss.combine(values, rows.index).sum() / batch.weight_of_step).backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), settings.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.process_time() - began


if __name__ == "__main__":
    main()
