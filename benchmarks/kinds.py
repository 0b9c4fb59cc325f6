"""Compares all kinds of drafter on one target at equal training tokens: one table, and their order.

All arms read the same records in the same order, for the same number of steps. Each kind goes up one grid of learning rates as long
as block efficiency in greedy replay on the validation prompts improves. The best rate is chosen. The test prompts are decoded once, at
the end, with that drafter and with the same drafter untrained.

    python benchmarks/kinds.py runs/kinds [section.key=value ...] [--recipe demo] [--kinds medusa eagle3 ...]

Each arm has its own run. If the command is run again, finished parts are loaded.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit, processor
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.figures import compare
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Result, read_result
from drafttrain.eval.settings import length_label
from drafttrain.pipeline.data import contaminated_prompts
from drafttrain.pipeline.drafter_run import DrafterRun

EQUAL = (
    "data.sources=[{kind: generated}]",
    "data.cache=states",
    "train.max_steps=128",
    "train.batch_size=16",
    "train.eval_every_steps=64",
    "train.eval_prompts=24",
    "train.loggers=[csv]",
    "eval.num_prompts=32",
    "eval.max_new_tokens=64",
)
"""Settings that all arms share. They replace those of the recipe."""

KINDS = {
    "causal_lm": ("drafter={kind: causal_lm, init: checkpoint, checkpoint: 'builtin:drafter'}", "loss.kind=tvdpp"),
    "causal_lm_fresh": ("drafter={kind: causal_lm}", "loss.kind=tvdpp"),
    "medusa": ("drafter={kind: medusa}", "loss.kind=ce"),
    "kangaroo": ("drafter={kind: kangaroo}", "loss.kind=forward_kl"),
    "eagle": ("drafter={kind: eagle}", "loss.kind=forward_kl"),
    "eagle3": ("drafter={kind: eagle3, num_steps: 3, draft_vocab_size: 1024}", "loss.kind=lk_hybrid"),
    "medusa2": ("drafter={kind: medusa, joint: {head_lr_multiplier: 4}}", "loss.kind=ce"),
}
"""Changes of the recipe for each kind; the loss is that of its own recipe. Overrides from the command line come after."""

FIRST_RATE = {"kangaroo": 6e-3, "eagle": 6e-3, "eagle3": 2e-2}
"""First rate of the grid of a kind: these three are known to need a high rate (recipes/tiny_eagle3.yaml)."""

ENOUGH = 0.01
"""Gain in block efficiency on the validation prompts that is needed to try the next rate."""

TOGETHER = 16
"""Test prompts decoded together; every prompt has its own random numbers."""

OF_CACHE = "its draft cache holds one path"
NO_TREE = {"causal_lm": OF_CACHE, "causal_lm_fresh": OF_CACHE, "kangaroo": f"{OF_CACHE}, the target's own"}
"""Why a kind drafts chains only."""

TREE = TreeSettings(num_draft_tokens=24, depth=5, width=4)


def main() -> None:
    """Train every arm, evaluate the best of each kind, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="demo", help="recipe of target, data, training and prompts")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3, 2e-2, 6e-2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validation-only", action="store_true", help="stop before the test prompts")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all kinds, kind:section.key=value for one")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    base = load_recipe(arguments.recipe, [*changes(arguments, "causal_lm"), "data.cache=none"])
    gen(base, arguments.out / "texts")
    shared = DrafterRun(base, arguments.out / "texts", quiet=True)
    best = {kind: best_of(arguments, kind, shared) for kind in arguments.kinds}
    if arguments.validation_only:
        return
    results = {kind: tested(arguments.out / kind, kind, *best[kind]) for kind in arguments.kinds}
    print(table(results))
    print(order(results))
    some = next(iter(results.values()))
    print(f"\n{some['num_prompts']} test prompts, {processor()}, commit {commit()}")


def changes(arguments: argparse.Namespace, kind: str) -> list[str]:
    """Return the overrides of a kind's arms."""
    given = [one.removeprefix(f"{kind}:") for one in arguments.overrides]
    return [*EQUAL, *KINDS[kind], *(one for one in given if ":" not in one.split("=")[0])]


def best_of(arguments: argparse.Namespace, kind: str, shared: DrafterRun) -> tuple[DrafterRun, float]:
    """Train a kind with rates of the grid, upwards as long as that helps; return the best run and its rate.

    Args:
        shared: Holds the target and its texts for the validation prompts, which are the same for all arms.
    """
    runs: dict[float, DrafterRun] = {}
    found: dict[float, float] = {}
    for rate in (one for one in arguments.rates if one >= FIRST_RATE.get(kind, 0.0)):
        began = time.perf_counter()
        run = runs[rate] = trained(arguments, kind, rate, shared)
        done = run.export_best()
        found[rate] = done.best
        print(
            f"{kind}, rate {rate:g}: validation {found[rate]:.3f} at step {done.best_step}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if len(found) > 1 and found[rate] < max(value for one, value in found.items() if one != rate) + ENOUGH:
            break
    rate = max(found, key=lambda one: found[one])
    write_json(arguments.out / kind / "rates.json", {f"{one:g}": value for one, value in found.items()})
    return runs[rate], rate


def trained(arguments: argparse.Namespace, kind: str, rate: float, shared: DrafterRun) -> DrafterRun:
    """Return the trained run of one arm. The rate applies to the added modules: Medusa-2's adapters learn at a quarter of it."""
    own = [f"train.lr={rate / 4 if kind == 'medusa2' else rate:g}", f"name={kind}-{rate:g}"]
    recipe = load_recipe(arguments.recipe, [*changes(arguments, kind), *own])
    data = (arguments.out / kind / "data").resolve()
    folder = arguments.out / kind / f"{rate:g}"
    for link, place in ((data / "generated", arguments.out / "texts" / "data" / "generated"), (folder / "data", data)):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(place.resolve())
    run = DrafterRun(recipe, folder, quiet=True)
    run.target, run.validation_texts = shared.target, shared.validation_texts
    run.train()
    return run


@dataclass(frozen=True)
class Tested:
    """The best drafter of a kind on the test prompts."""

    result: Result
    mbsu_by_token_a_round: dict[str, float]
    """Memory-bound speed-up over block efficiency, by arm."""
    rate: float
    trained_parameters: int


def tested(folder: Path, kind: str, run: DrafterRun, rate: float) -> Tested:
    """Return the figures on the test prompts, which are decoded once and stored."""
    file, more, wanted = folder / "eval.json", folder / "arm.json", run.recipe.eval
    if file.exists() and more.exists():
        return Tested(read_result(file), **json.loads(more.read_text(encoding="utf-8")))
    prompts, validation = (
        read_prompts(
            name,
            run.tokenizer,
            prompt_tokens=wanted.prompt_tokens,
            dropped=contaminated_prompts(run, name),
            limit=wanted.num_prompts,
        )
        for name in (wanted.prompts, wanted.validation_prompts)
    )
    also = [] if kind in NO_TREE else [TREE]
    settings = replace(
        wanted, num_prompts=None, speed_prompts=0, temperatures=[0.0, 1.0], also=also, batch_size=TOGETHER
    )
    result = evaluate({kind: run.folder.drafter, "start": run.folder.start}, run.target, prompts, settings)
    # Bytes are those of one sequence decoded alone. A round's bytes depend on its draft length, hardly on the text.
    alone = replace(settings, batch_size=1, temperatures=[0.0])
    (part,) = evaluate({kind: run.folder.drafter}, run.target, validation[:2], alone).temperatures
    mbsu = {arm: figures.mbsu * figures.target_calls_per_token for arm, figures in part.drafters.items()}
    count = sum(p.numel() for p in run.drafter.parameters() if p.requires_grad)
    result.write(file)
    write_json(more, {"mbsu_by_token_a_round": mbsu, "rate": rate, "trained_parameters": count})
    print(f"{kind}: evaluated in {result.seconds:.0f} s", flush=True)
    return Tested(result, mbsu, rate, count)


def table(results: dict[str, Tested]) -> str:
    """Return the figures by kind, draft and temperature."""
    lines = [
        "| kind | trained parameters | rate | draft | temperature | block efficiency | its start | gain, paired | MBSU | parity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    tree = f" ({length_label(TREE)})"
    for kind, one in results.items():
        for draft, suffix in (("chain", ""), ("tree", tree)):
            if suffix and kind in NO_TREE:
                lines.append(f"| `{kind}` | | | no tree | | {NO_TREE[kind]} | | | | |")
                continue
            for part in one.result.temperatures:
                head = f"| `{kind}` | {one.trained_parameters:,} | {one.rate:g} | {draft} | {part.temperature:g} |"
                figures, start = part.drafters[kind + suffix], part.drafters["start" + suffix]
                mbsu = one.mbsu_by_token_a_round[kind + suffix] * figures.block_efficiency.value
                gain = part.comparisons[f"{kind}{suffix} - start{suffix}"].block_efficiency
                lines.append(
                    f"{head} {figures.block_efficiency.text()} | {start.block_efficiency.value:.2f} "
                    f"| {gain.text()} | {mbsu:.2f} | {figures.parity or ''} |"
                )
    return "\n".join(lines)


def order(results: dict[str, Tested]) -> str:
    """Return the kinds from the best chain to the worst, each with its difference to the one above on the same prompts."""
    lines = []
    for number, temperature in enumerate((0.0, 1.0)):
        figures = {kind: one.result.temperatures[number].drafters[kind] for kind, one in results.items()}
        ranked = sorted(figures, key=lambda kind: -figures[kind].block_efficiency.value)
        parts = [f"{ranked[0]} {figures[ranked[0]].block_efficiency.value:.2f}"]
        for above, kind in pairwise(ranked):
            found = compare(figures[above].prompts, figures[kind].prompts).block_efficiency
            parts.append(f"{kind} {figures[kind].block_efficiency.value:.2f} (below by {found.text()})")
        lines.append(f"\nOrder of the chains at temperature {temperature:g}: {', '.join(parts)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
