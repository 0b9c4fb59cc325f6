"""Compares EAGLE-3 with the library speculators on the same texts and states: trained positions per CPU second, block efficiency.

Both train on texts that stories260K generates, with its states stored before training, in float32, for the same number of epochs,
with Muon and their KL loss over three steps of rollout. Each side has a grid of learning rates. speculators also has a grid of packed
lengths, because its cost per position depends on them. The best arm of each side by block efficiency on the validation prompts is
decoded once on the test prompts, by the same evaluator (speculators' checkpoint goes through `drafttrain import`). The training runs
of both sides alternate.

    drafttrain engines install speculators
    python benchmarks/eagle3_peer.py MODEL OUT

MODEL is a folder of stories260K. If the command is run again, finished parts are loaded.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from stories260k import openings, the_recipe

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit, processor
from drafttrain.environments.environment import check_installed, python_of
from drafttrain.environments.known import SPECULATORS
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.result import Result
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.importers.convert import import_folder
from drafttrain.pipeline.data import training_data
from drafttrain.pipeline.drafter_run import DrafterRun

THREADS = 1
NUM_STEPS = 3


def main() -> None:
    """Train both sides in turns, choose, decode, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of stories260K")
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[6e-3, 2e-2, 4e-2, 8e-2])
    parser.add_argument("--their-rates", type=float, nargs="+", default=[5e-4, 2e-3, 6e-3])
    parser.add_argument("--their-lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=16, help="our records per optimizer step")
    parser.add_argument("--loss", default="forward_kl")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    arguments.out = arguments.out.resolve()
    if arguments.one:
        ours(arguments, float(arguments.one))
        return
    check_installed(SPECULATORS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "train.jsonl").exists():
        openings(arguments.model, arguments.out, arguments.records)
    shared = run_of(arguments, arguments.rates[0], arguments.out / "texts")
    gen(shared.recipe, shared.folder.path)
    positions = write_for_them(arguments, shared)
    done: dict[str, dict[str, Any]] = {}
    their_arms = [(length, rate) for length in arguments.their_lengths for rate in arguments.their_rates]
    for rate, theirs in zip_longest(arguments.rates, their_arms):
        for name, arm in arms(arguments, rate, theirs):
            done[name] = arm | validated(arguments, shared, name, Path(arm["drafter"]))
            speed = positions * arguments.epochs / arm["seconds"]
            print(
                f"{name}: {speed:,.0f} positions per CPU second, validation {done[name]['validation']:.3f}", flush=True
            )
    print(table(arguments, shared, done, positions))


def run_of(arguments: argparse.Namespace, rate: float, folder: Path) -> DrafterRun:
    """Return a run of this project with one learning rate; the run that only writes the texts always has the same recipe."""
    batch = arguments.batch
    if folder.name == "texts":
        rate, batch = 6e-3, 16
    arguments.steps = arguments.records * arguments.epochs // batch
    recipe = the_recipe(arguments)
    recipe["drafter"] = {"kind": "eagle3", "num_steps": NUM_STEPS}
    train: Any = recipe["train"]
    train |= {
        "batch_size": batch,
        "lr": rate,
        "warmup_steps": min(20, arguments.steps),
        "eval_every_steps": 0,
        "loggers": ["csv"],
    }
    recipe["export"] = {"require": {"parity": True}}
    file = arguments.out / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    data = arguments.out / "texts" / "data"
    if not (folder / "data").exists() and folder.name != "texts":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data").symlink_to(data)
    return DrafterRun(load_recipe(str(file)), folder)


def write_for_them(arguments: argparse.Namespace, run: DrafterRun) -> int:
    """Write the training records with their states for speculators; return the number of positions in an epoch."""
    records = [store[i] for store in training_data(run).stores for i in range(len(store))]
    folder = arguments.out / "theirs"
    if not (folder / "data" / "dataset").exists():
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"tokens": r.tokens, "mask": r.loss_mask}) for r in records]
        (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
        ask(
            arguments,
            "prepare",
            {
                "records": str(folder / "records.jsonl"),
                "model": str(Path(arguments.model).resolve()),
                "data": str(folder / "data"),
                "taps": list(run.drafter.taps),
            },
        )
    return sum(sum(record.loss_mask[1:]) for record in records)


def arms(
    arguments: argparse.Namespace, rate: float | None, theirs: tuple[int, float] | None
) -> list[tuple[str, dict[str, Any]]]:
    """Train one arm of each side, or load the trained one; return their names with CPU seconds and folders."""
    found = []
    if rate is not None:
        name = f"ours-{arguments.batch}-{rate:g}"
        file = arguments.out / name / "arm.json"
        if not file.exists():
            subprocess.run([sys.executable, *sys.argv, "--one", str(rate)], check=True)
        found.append((name, json.loads(file.read_text(encoding="utf-8"))))
    if theirs is not None:
        found.append(their_arm(arguments, *theirs))
    return found


def ours(arguments: argparse.Namespace, rate: float) -> None:
    """Train one arm in this process, which runs nothing else; write its CPU seconds."""
    run = run_of(arguments, rate, arguments.out / f"ours-{arguments.batch}-{rate:g}")
    training_data(run)
    began = cpu_seconds()
    run.train()
    seconds = cpu_seconds() - began
    run.export_best()
    write_json(
        run.folder.path / "arm.json",
        {"seconds": seconds, "steps": run.recipe.train.max_steps, "drafter": str(run.folder.drafter)},
    )


def their_arm(arguments: argparse.Namespace, length: int, rate: float) -> tuple[str, dict[str, Any]]:
    """Train one arm of speculators with its own command and import its last checkpoint."""
    name = f"speculators-{length}-{rate:g}"
    folder = arguments.out / name
    if not (folder / "arm.json").exists():
        data = arguments.out / "theirs" / "data"
        options = {
            "verifier-name-or-path": str(Path(arguments.model).resolve()),
            "data-path": str(data / "dataset"),
            "hidden-states-path": str(data / "hidden_states"),
            "save-path": str(folder / "checkpoints"),
            "epochs": arguments.epochs,
            "lr": rate,
            "total-seq-len": length,
            "ttt-steps": NUM_STEPS,
            "loss-implementation": "eager",
            "draft-attn-impl": "sdpa",
            "hidden-states-dtype": "float32",
            "num-workers": 0,
            "train-data-ratio": 0.999,
            "checkpoint-freq": arguments.epochs,
            "log-freq": 1_000_000,
            "on-missing": "raise",
            "speculator-type": "eagle3",
        }
        taps = [str(tap) for tap in taps_of(arguments)]
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        seconds = folder / "seconds.json"
        folder.mkdir(parents=True, exist_ok=True)
        ask(arguments, "train", [*flags, "--target-layer-ids", *taps], seconds_to=str(seconds))
        last = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        import_folder(last, folder / "drafter", target=str(Path(arguments.model).resolve()))
        spent = json.loads(seconds.read_text(encoding="utf-8"))
        write_json(folder / "arm.json", spent | {"drafter": str(folder / "drafter")})
    return name, json.loads((folder / "arm.json").read_text(encoding="utf-8"))


def taps_of(arguments: argparse.Namespace) -> list[int]:
    """Return the blocks that both sides tap."""
    from drafttrain.drafters.eagle.eagle3 import taps_of as places

    config = json.loads((Path(arguments.model) / "config.json").read_text(encoding="utf-8"))
    return places(config["num_hidden_layers"])


def ask(arguments: argparse.Namespace, what: str, request: Any, **more: Any) -> None:
    """Run one request in the environment of speculators."""
    file = arguments.out / "request.json"
    write_json(file, {what: request, "threads": THREADS, **more})
    worker = Path(__file__).with_name("eagle3_peer_worker.py")
    log = arguments.out / "speculators.log"
    with log.open("a", encoding="utf-8") as lines:
        done = subprocess.run(
            [str(python_of(SPECULATORS)), str(worker), str(file)], stdout=lines, stderr=lines, check=False
        )
    if done.returncode:
        raise SystemExit(f"speculators failed, see {log}")


def validated(arguments: argparse.Namespace, shared: DrafterRun, name: str, drafter: Path) -> dict[str, float]:
    """Return the greedy block efficiency on the validation prompts, decoded once."""
    file = arguments.out / name / "validation.json"
    if not file.exists():
        result = decoded(shared, {name: drafter}, shared.recipe.eval.validation_prompts, [0.0])
        write_json(file, result.temperatures[0].drafters[name].block_efficiency.json())
    return {"validation": json.loads(file.read_text(encoding="utf-8"))["value"]}


def decoded(run: DrafterRun, drafters: dict[str, Path], file: str, temperatures: list[float]) -> Result:
    """Decode all prompts of a file with drafters in chains."""
    wanted = run.recipe.eval
    prompts = read_prompts(file, run.tokenizer, prompt_tokens=wanted.prompt_tokens, dropped=[], limit=None)
    settings = replace(
        wanted, num_prompts=None, speed_prompts=0, temperatures=temperatures, max_new_tokens=96, batch_size=16
    )
    return evaluate(drafters, run.target, prompts, settings)


def table(arguments: argparse.Namespace, shared: DrafterRun, done: dict[str, dict[str, Any]], positions: int) -> str:
    """Return the best arm of each side, compared on the test prompts, and the speeds of all arms."""
    best = {}
    for side in ("ours", "speculators"):
        own = {name: arm for name, arm in done.items() if name.startswith(side)}
        best[side] = max(own, key=lambda name: own[name]["validation"])
    result = decoded(
        shared, {name: Path(done[name]["drafter"]) for name in best.values()}, shared.recipe.eval.prompts, [0.0, 1.0]
    )
    work = positions * arguments.epochs
    lines = ["| arm | optimizer steps | positions per CPU second | validation |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {arm['steps']} | {work / arm['seconds']:,.0f} | {arm['validation']:.3f} |"
        for name, arm in done.items()
    ]
    lines += ["", "| temperature | ours | speculators | ours - speculators, paired |", "|---|---|---|---|"]
    for part in result.temperatures:
        values = [part.drafters[name].block_efficiency.text() for name in best.values()]
        (gain,) = part.comparisons.values()
        lines.append(f"| {part.temperature:g} | {' | '.join(values)} | {gain.block_efficiency.text()} |")
    mine = [arm["seconds"] for name, arm in done.items() if name.startswith("ours")]
    length = best["speculators"].split("-")[1]
    for which, prefix in (("its best arm's length", f"speculators-{length}-"), ("all its arms", "speculators-")):
        theirs = [arm["seconds"] for name, arm in done.items() if name.startswith(prefix)]
        count = min(len(mine), len(theirs))
        found = ratio_of_ratios(([work] * count, mine[:count]), ([work] * count, theirs[:count]))
        lines.append(f"\nPositions per CPU second, ours / speculators ({which}): {found.text()}")
    fastest = min((arm["seconds"], name) for name, arm in done.items() if name.startswith("speculators"))
    chosen = done[best["ours"]]["seconds"]
    lines.append(f"\nOur best arm / its fastest arm ({fastest[1]}): {fastest[0] / chosen:.2f}")
    lines.append(
        f"\n{positions:,} trained positions per epoch, {arguments.epochs} epochs, {processor()}, {THREADS} thread, commit {commit()}"
    )
    return "\n".join(lines)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
