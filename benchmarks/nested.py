"""Nested drafters beside separate ones of the same sizes, data and steps: sorted depths (S2D) and nested widths (MatFormer).

    python benchmarks/nested.py runs/nested [--parts depths widths] [--seeds 0 1 2] [--threads 1] [section.key=value ...]

Depths: one sorted drafter for the embedded target beside three drafters of 1, 2 and 4 layers; then the same sorted drafter for two
targets, with thresholds for each. Widths: a language model of nested widths whose quarter drafts for the whole, beside two models
that were trained by themselves. Runs are resumed. Counts of a prompt are summed over the seeds; intervals are over prompts.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import drafttrain
from drafttrain.checkpoint import read_drafter
from drafttrain.commands.extract import extract
from drafttrain.commands.fit import fit
from drafttrain.config.load import load_recipe
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.drafters.sorted_lm.module import FILE
from drafttrain.eval.figures import compare
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.metrics import PromptCounts, over_seeds
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.ffn_slice import FFNSliceSettings
from drafttrain.eval.replay import Text
from drafttrain.eval.result import Result
from drafttrain.eval.statistics import ratio_interval
from drafttrain.export.drafter import CalibrationTexts, calibrated
from drafttrain.target_model import Target

LAYERS = (1, 2, 4)
NEURONS, QUARTER = 256, 64
TARGETS = ("builtin:target", "builtin:drafter")
EVALUATION: dict[str, Any] = {
    **{"max_new_tokens": 64, "speed_prompts": 0, "temperatures": [0, 1]},
    "length": FixedLengthSettings(5),
}
FEWER = ["eval.num_prompts=2", "eval.max_new_tokens=8", "eval.speed_prompts=0", "eval.start=false", "export.require={}"]
"""The run's own evaluation is not read."""
WIDTHS = [
    *("target.model=null", "target.tokenizer=builtin:target", "data.generate=null", "data.sources=[{kind: stdlib}]"),
    *("data.cache=none", "loss={kind: ce}", "train.max_steps=300", "train.batch_size=32", "data.max_length=128"),
]


def main() -> None:
    """Train, evaluate and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=["depths", "widths"], default=["depths", "widths"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32, help="test prompts")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all trainings")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    parts = {"depths": depths, "widths": widths}
    for name in arguments.parts:
        print(parts[name](arguments), flush=True)
    print(f"\nSeeds {arguments.seeds}, {processor()}, commit {commit()}")


def depths(arguments: argparse.Namespace) -> str:
    """Return the tables of the sorted drafter."""
    results: dict[str, list[Result]] = {name: [] for name in TARGETS}
    chosen: dict[str, list[list[float]]] = {name: [] for name in TARGETS}
    for seed in arguments.seeds:
        place = arguments.out / f"depths-{seed}"
        nested = trained(arguments, place / "nested", "tiny_sorted", seed)
        arms = {"routed": nested}
        for layers in LAYERS:
            own = [f"drafter={{kind: causal_lm, embedding_init: target, num_layers: {layers}}}"]
            arms[f"nested, {layers}"] = sub_model(nested, place / f"nested-{layers}", num_layers=layers)
            arms[f"separate, {layers}"] = trained(
                arguments, place / f"separate-{layers}", "tiny_sorted", seed, own, texts_of=nested.parent
            )
        for name in TARGETS:
            target = drafttrain.load_target(name)
            chosen[name].append(calibrated_for(nested, target))
            results[name].append(drafttrain.evaluate(arms, target, num_prompts=arguments.prompts, **EVALUATION))
    lines = [
        "| target | temperature | drafter | block efficiency | MBSU | nested less separate, paired |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for number, temperature in enumerate(EVALUATION["temperatures"]):
            for arm in found[0].temperatures[number].drafters:
                other = arm.replace("nested", "separate")
                gain = difference(found, number, arm, other) if other != arm else ""
                lines.append(
                    f"| `{name}` | {temperature} | {arm} | {pooled(found, number, arm)} | {mean_mbsu(found, number, arm):.2f} | {gain} |"
                )
        best = max((f"nested, {layers}" for layers in LAYERS), key=lambda arm: mean_mbsu(found, 0, arm))
        lines.append(
            f"| `{name}` | 0 | routed less its best single exit by MBSU ({best}) | {difference(found, 0, 'routed', best)} | | |"
        )
    lines += [
        "",
        "Thresholds of the exits, by seed: " + "; ".join(f"`{name}` {values}" for name, values in chosen.items()),
    ]
    return "\n".join(lines)


def widths(arguments: argparse.Namespace) -> str:
    """Return the table of nested widths."""
    results: dict[str, list[Result]] = {"nested": [], "separate": []}
    sizes = "init: scratch, num_layers: 3, hidden_size: 96, num_heads: 3"
    for seed in arguments.seeds:
        place = arguments.out / f"widths-{seed}"
        made = {
            "nested": f"{{kind: matformer, {sizes}, intermediate_size: {NEURONS}, widths: [0.25, 0.5]}}",
            "separate": f"{{kind: causal_lm, {sizes}, intermediate_size: {NEURONS}}}",
            "small": f"{{kind: causal_lm, {sizes}, intermediate_size: {QUARTER}}}",
        }
        folders = {
            name: trained(arguments, place / name, "tiny_matformer", seed, [*WIDTHS, f"drafter={drafter}"])
            for name, drafter in made.items()
        }
        quarter = sub_model(folders["nested"], place / "quarter", widths=[QUARTER])
        for name, drafter in (("nested", quarter), ("separate", folders["small"])):
            beside = [FFNSliceSettings()] if name == "nested" else []
            target = drafttrain.load_target(str(folders[name]))
            settings = {"num_prompts": arguments.prompts, "beside": beside, **EVALUATION}
            results[name].append(drafttrain.evaluate(drafter, target, **settings))
    lines = ["| temperature | pair | block efficiency | by seed | difference, paired |", "|---|---|---|---|---|"]
    nested = results["nested"]
    for number, temperature in enumerate(EVALUATION["temperatures"]):
        mine, other = (counts(results[name], number, "drafter") for name in results)
        gain = compare(mine, other).block_efficiency.text()
        lines.append(
            f"| {temperature} | nested: quarter, own keys | {pooled(nested, number, 'drafter')} | {by_seed(nested, number, 'drafter')} | {gain} over separate |"
        )
        lost = difference(nested, number, "ffn_slice", "drafter")
        lines.append(
            f"| {temperature} | nested: quarter, shared keys | {pooled(nested, number, 'ffn_slice')} | {by_seed(nested, number, 'ffn_slice')} | {lost} over own keys |"
        )
        separate = results["separate"]
        lines.append(
            f"| {temperature} | separate: small and whole | {pooled(separate, number, 'drafter')} | {by_seed(separate, number, 'drafter')} | |"
        )
    parity = {str(one.temperatures[0].drafters[arm].parity) for one in nested for arm in ("drafter", "ffn_slice")}
    return "\n".join([*lines, "", f"Greedy parity of the nested pair: {sorted(parity)}"])


def trained(
    arguments: argparse.Namespace,
    place: Path,
    recipe: str,
    seed: int,
    own: Sequence[str] = (),
    *,
    texts_of: Path | None = None,
) -> Path:
    """Return the drafter folder of a run, which is trained if it is not there yet.

    Args:
        texts_of: A run whose generated texts it reads.
    """
    if texts_of is not None and not (place / "data" / "generated").exists():
        shutil.copytree(texts_of / "data" / "generated", place / "data" / "generated")
    if not (place / "drafter").exists():
        fit(load_recipe(recipe, [f"seed={seed}", *FEWER, *own, *arguments.overrides]), place)
    return place / "drafter"


def sub_model(drafter: Path, out: Path, *, num_layers: int | None = None, widths: Sequence[int] | None = None) -> Path:
    """Return the folder of a sub-model."""
    if not out.exists():
        extract(str(drafter), out, num_layers=num_layers, widths=widths)
    return out


def calibrated_for(folder: Path, target: Target) -> list[float]:
    """Write the thresholds of a sorted drafter for a target into its folder; return them."""
    prompts = read_prompts("builtin:validation", target.tokenizer, prompt_tokens=32, limit=16)
    tasks = [Task(prompt.id, list(prompt.tokens), Sampling()) for prompt in prompts]
    written = continuations(tasks, target, max_new_tokens=96, seed=0)
    texts = [Text(task.id, task.prompt, new) for task, new in zip(tasks, written, strict=True)]
    files = calibrated(read_drafter(folder, target), CalibrationTexts(texts, target))
    for name, content in files.items():
        write_json(folder / name, content)
    return list(files[FILE]["thresholds"][target.fingerprint])


def counts(results: Sequence[Result], number: int, arm: str) -> list[PromptCounts]:
    """Return the counts of every prompt, summed over the seeds."""
    return over_seeds([one.temperatures[number].drafters[arm].prompts for one in results])


def pooled(results: Sequence[Result], number: int, arm: str) -> str:
    """Return the block efficiency over all seeds."""
    found = counts(results, number, arm)
    return ratio_interval([one.num_tokens for one in found], [one.num_rounds for one in found]).text()


def difference(results: Sequence[Result], number: int, arm: str, other: str) -> str:
    """Return the paired difference in block efficiency."""
    return compare(counts(results, number, arm), counts(results, number, other)).block_efficiency.text()


def mean_mbsu(results: Sequence[Result], number: int, arm: str) -> float:
    """Return the memory-bound speed-up, the mean of the seeds."""
    found = [one.temperatures[number].drafters[arm].mbsu for one in results]
    return sum(found) / len(found)


def by_seed(results: Sequence[Result], number: int, arm: str) -> str:
    """Return the block efficiency of each seed."""
    return ", ".join(f"{one.temperatures[number].drafters[arm].block_efficiency.value:.2f}" for one in results)


if __name__ == "__main__":
    main()
