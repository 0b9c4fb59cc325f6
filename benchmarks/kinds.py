"""Compares all kinds of drafter on one target at equal training tokens: one table, and their order.

All arms of a seed read the same records in the same order, for the same number of steps. On the first seed each kind goes up one grid
of learning rates as long as block efficiency in greedy replay on the validation prompts improves. The best rate is chosen, and the
other seeds, which have texts of their own, train at it. The test prompts are decoded once, at the end; the first seed decodes them
with the same drafter untrained as well.

    python benchmarks/kinds.py runs/kinds [section.key=value ...] [--recipe demo] [--kinds medusa eagle3 ...] [--seeds 0 1 2]

Each arm has its own run. If the command is run again, finished parts are loaded. So several processes may share the work: each takes
some of the kinds, after one with `--kinds` alone has written the texts, and a last one prints the table of all.
"""

import argparse
import json
import time
from collections.abc import Sequence
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
from drafttrain.eval.metrics import PromptCounts, over_seeds
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Result, read_result
from drafttrain.eval.settings import length_label
from drafttrain.eval.statistics import ratio_interval
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

OF_BLOCK = "num_layers: 2, taps: [1, 3, 5], gamma: 4.0, anchors: 64, mask_token_id: 1"
"""What block kinds share: the settings of recipes/tiny_dflash.yaml. The blocks below draft five tokens, as the chains of the others."""

DISTANCE = "loss={kind: sum, terms: [{loss: {kind: ce}, weight: 0.1}, {loss: {kind: tvd}, weight: 1.8}, {loss: {kind: confidence}}]}"

KINDS = {
    "causal_lm": ("drafter={kind: causal_lm, init: checkpoint, checkpoint: 'builtin:drafter'}", "loss.kind=tvdpp"),
    "causal_lm_fresh": ("drafter={kind: causal_lm}", "loss.kind=tvdpp"),
    "medusa": ("drafter={kind: medusa}", "loss.kind=ce"),
    "kangaroo": ("drafter={kind: kangaroo}", "loss.kind=forward_kl"),
    "early_exit": ("drafter={kind: early_exit, rotation: 2, tune: {lora: {rank: 16}}}", "loss.kind=forward_kl"),
    "eagle": ("drafter={kind: eagle}", "loss.kind=forward_kl"),
    "eagle3": ("drafter={kind: eagle3, num_steps: 3, draft_vocab_size: 1024}", "loss.kind=lk_hybrid"),
    "chimera": ("drafter={kind: chimera, draft_vocab_size: 1024}", "loss.kind=forward_kl"),
    "hidden_transfer": ("drafter={kind: hidden_transfer, train_steps: together}", "loss.kind=forward_kl"),
    "p_eagle": ("drafter={kind: p_eagle, num_layers: 2, num_depths: 5, mask_token_id: 1}", "loss.kind=forward_kl"),
    "dflash": (f"drafter={{kind: dflash, block_size: 6, {OF_BLOCK}}}", "loss.kind=forward_kl"),
    "jetspec": (f"drafter={{kind: dflash, causal: true, block_size: 6, {OF_BLOCK}}}", "loss.kind=forward_kl"),
    "dspark": (f"drafter={{kind: dspark, block_size: 5, markov_rank: 32, {OF_BLOCK}}}", DISTANCE),
    "domino": (f"drafter={{kind: domino, block_size: 5, gru_hidden_dim: 64, emb_dim: 32, {OF_BLOCK}}}", "loss.kind=ce"),
    "xpress": (
        f"drafter={{kind: xpress, block_size: 6, rank: 32, mlp_hidden: 64, num_passes: 5, {OF_BLOCK}}}",
        "loss.kind=ce",
    ),
    "dflash2": (f"drafter={{kind: dflash2, block_size: 6, selector_rank: 32, {OF_BLOCK}}}", "loss.kind=ce"),
    "medusa2": ("drafter={kind: medusa, joint: {head_lr_multiplier: 4}}", "loss.kind=ce"),
}
"""Changes of the recipe for each kind; the loss is that of its own recipe. Overrides from the command line come after."""

FIRST_RATE = {"kangaroo": 6e-3, "eagle": 6e-3, "eagle3": 2e-2}
"""First rate of the grid of a kind: these three are known to need a high rate (recipes/tiny_eagle3.yaml)."""

ENOUGH = 0.01
"""Gain in block efficiency on the validation prompts that is needed to try the next rate."""

TOGETHER = 16
"""Test prompts decoded together; every prompt has its own random numbers."""

NO_TREE = dict.fromkeys(("kangaroo", "early_exit"), "its draft cache holds one path, the target's own")
"""Why a kind drafts chains only."""

TREE = TreeSettings(num_draft_tokens=24, depth=5, width=4)


def main() -> None:
    """Train every arm, evaluate the best of each kind, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="demo", help="recipe of target, data, training and prompts")
    parser.add_argument(
        "--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="none: only write the texts"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 6e-3, 2e-2, 6e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one chooses the rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validation-only", action="store_true", help="stop before the test prompts")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all kinds, kind:section.key=value for one")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    seeds = [Seed.written(arguments, seed) for seed in arguments.seeds]
    rates = {kind: best_rate(seeds[0], kind) for kind in arguments.kinds}
    if arguments.validation_only or not rates:
        return
    results = {kind: [tested(seed, kind, rate) for seed in seeds] for kind, rate in rates.items()}
    print(table(results))
    print(order(results))
    some = results[arguments.kinds[0]][0].result
    print(f"\n{some.num_prompts} test prompts, seeds {arguments.seeds}, {processor()}, commit {commit()}")


@dataclass(frozen=True)
class Seed:
    """One repetition of the whole comparison: its texts, its order of records, its starts."""

    arguments: argparse.Namespace
    number: int
    shared: DrafterRun
    """Holds the target and its texts for the validation prompts, which are the same for all arms."""

    @classmethod
    def written(cls, arguments: argparse.Namespace, number: int) -> "Seed":
        """Return a seed after its texts were generated."""
        base = load_recipe(arguments.recipe, [*changes(arguments, "medusa"), "data.cache=none", f"seed={number}"])
        texts = arguments.out / f"seed-{number}" / "texts"
        gen(base, texts)
        return cls(arguments, number, DrafterRun(base, texts))

    @property
    def folder(self) -> Path:
        """Return the folder that holds the texts and one folder a kind."""
        return self.arguments.out / f"seed-{self.number}"

    def trained(self, kind: str, rate: float) -> tuple[DrafterRun, float]:
        """Return the trained run of one arm, and its best block efficiency on the validation prompts.

        The rate applies to the added modules: Medusa-2's adapters learn at a quarter of it.
        """
        own = [f"train.lr={rate / 4 if kind == 'medusa2' else rate:g}", f"name={kind}-{rate:g}", f"seed={self.number}"]
        recipe = load_recipe(self.arguments.recipe, [*changes(self.arguments, kind), *own])
        data = (self.folder / kind / "data").resolve()
        folder = self.folder / kind / f"{rate:g}"
        texts = self.folder / "texts" / "data" / "generated"
        for link, place in ((data / "generated", texts), (folder / "data", data)):
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(place.resolve())
        run = DrafterRun(recipe, folder)
        run.target, run.validation.texts = self.shared.target, self.shared.validation.texts
        began = time.perf_counter()
        run.train()
        done = run.export_best()
        print(
            f"{kind}, rate {rate:g}, seed {self.number}: validation {done.best:.3f} at step {done.best_step}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        return run, done.best


def changes(arguments: argparse.Namespace, kind: str) -> list[str]:
    """Return the overrides of a kind's arms."""
    given = [one.removeprefix(f"{kind}:") for one in arguments.overrides]
    return [*EQUAL, *KINDS[kind], *(one for one in given if ":" not in one.split("=")[0])]


def best_rate(seed: Seed, kind: str) -> float:
    """Train a kind with rates of the grid, upwards as long as that helps; return the best."""
    found: dict[float, float] = {}
    for rate in (one for one in seed.arguments.rates if one >= FIRST_RATE.get(kind, 0.0)):
        _, found[rate] = seed.trained(kind, rate)
        if len(found) > 1 and found[rate] < max(value for one, value in found.items() if one != rate) + ENOUGH:
            break
    write_json(seed.folder / kind / "rates.json", {f"{one:g}": value for one, value in found.items()})
    return max(found, key=lambda one: found[one])


@dataclass(frozen=True)
class Tested:
    """The best drafter of a kind on the test prompts."""

    result: Result
    mbsu_by_token_a_round: dict[str, float]
    """Memory-bound speed-up over block efficiency, by arm."""
    rate: float
    trained_parameters: int


def tested(seed: Seed, kind: str, rate: float) -> Tested:
    """Return the figures on the test prompts, which are decoded once and stored."""
    folder, (run, _) = seed.folder / kind, seed.trained(kind, rate)
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
    arms = {kind: run.folder.drafter}
    if seed.number == seed.arguments.seeds[0]:
        arms["start"] = run.folder.start
    result = evaluate(arms, run.target, prompts, settings)
    # Bytes are those of one sequence decoded alone. A round's bytes depend on its draft length, hardly on the text.
    alone = replace(settings, batch_size=1, temperatures=[0.0])
    (part,) = evaluate({kind: run.folder.drafter}, run.target, validation[:2], alone).temperatures
    mbsu = {arm: figures.mbsu * figures.target_calls_per_token for arm, figures in part.drafters.items()}
    count = sum(p.numel() for p in run.drafter.parameters() if p.requires_grad)
    result.write(file)
    write_json(more, {"mbsu_by_token_a_round": mbsu, "rate": rate, "trained_parameters": count})
    print(f"{kind}, seed {seed.number}: evaluated in {result.seconds:.0f} s", flush=True)
    return Tested(result, mbsu, rate, count)


def summed(repetitions: Sequence[Tested], number: int, arm: str) -> list[PromptCounts]:
    """Return the counts of every prompt, summed over the seeds.

    Args:
        number: Of the temperature.
    """
    return over_seeds([one.result.temperatures[number].drafters[arm].prompts for one in repetitions])


def table(results: dict[str, list[Tested]]) -> str:
    """Return the figures by kind, draft and temperature, over all seeds."""
    lines = [
        "| kind | trained parameters | rate | draft | temperature | block efficiency | by seed | its start | MBSU | parity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    tree = f" ({length_label(TREE)})"
    for kind, repetitions in results.items():
        first = repetitions[0]
        for draft, suffix in (("chain", ""), ("tree", tree)):
            if suffix and kind in NO_TREE:
                lines.append(f"| `{kind}` | | | no tree | | {NO_TREE[kind]} | | | | |")
                continue
            for number, part in enumerate(first.result.temperatures):
                found = [one.result.temperatures[number].drafters[kind + suffix] for one in repetitions]
                counts = summed(repetitions, number, kind + suffix)
                pooled = ratio_interval([one.num_tokens for one in counts], [one.num_rounds for one in counts])
                lines.append(
                    f"| `{kind}` | {first.trained_parameters:,} | {first.rate:g} | {draft} | {part.temperature:g} "
                    f"| {pooled.text()} | {', '.join(f'{one.block_efficiency.value:.2f}' for one in found)} "
                    f"| {part.drafters['start' + suffix].block_efficiency.value:.2f} "
                    f"| {first.mbsu_by_token_a_round[kind + suffix] * pooled.value:.2f} "
                    f"| {' / '.join(dict.fromkeys(one.parity.short() for one in found if one.parity))} |"
                )
    return "\n".join(lines)


def order(results: dict[str, list[Tested]]) -> str:
    """Return the kinds from the best chain to the worst, each with its difference to the one above on the same prompts."""
    lines = []
    for number, temperature in enumerate((0.0, 1.0)):
        counts = {kind: summed(repetitions, number, kind) for kind, repetitions in results.items()}
        values = {
            kind: sum(one.num_tokens for one in found) / sum(one.num_rounds for one in found)
            for kind, found in counts.items()
        }
        ranked = sorted(values, key=lambda kind: -values[kind])
        parts = [f"{ranked[0]} {values[ranked[0]]:.2f}"]
        for above, kind in pairwise(ranked):
            found = compare(counts[above], counts[kind]).block_efficiency
            parts.append(f"{kind} {values[kind]:.2f} (below by {found.text()})")
        lines.append(f"\nOrder of the chains at temperature {temperature:g}: {', '.join(parts)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
