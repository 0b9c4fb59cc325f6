"""Compares drafters inside the target on 30 blocks: SWIFT, early exit, DEL and Kangaroo, by the clock and by tokens per pass of a block.

    python benchmarks/early_exit.py OUT --model shared/data/models/stories260K        # grown, with training
    python benchmarks/early_exit.py OUT --target known:smollm2 --prompts builtin:chat # as it is, without training

With --model, blocks that do nothing (their last matrices are 0) are put after every block, six times as many in all: a made target,
whose real blocks are 1, 7, 13, 19 and 25 of 30. It writes texts; an adapter of Kangaroo and LayerSkip's adapters are trained on them.
Finished runs are loaded. SWIFT is at its best on such a target: most sublayers can be left out without any change.

All ways decode the same prompts one at a time, in turns with the plain decoding of their own target, on one thread. A pass is one
call of one block, also of Kangaroo's adapter, on whatever number of tokens; that of plain decoding is the number of blocks for each
token. Calls that search or observe count. Rates are sums over the prompts, divided once.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from stories260k import openings, the_recipe

from drafttrain.checkpoint import read_drafter
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.arms import Arm, Baseline, Source, decode
from drafttrain.eval.figures import speedup
from drafttrain.eval.length.confidence import ConfidenceSettings
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers import TrainingFree
from drafttrain.eval.proposers.dynamic_exit import DelSettings
from drafttrain.eval.proposers.early_exit import EarlyExitProposerSettings
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.proposers.swift import SwiftSettings
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.statistics import ratio_interval
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.anatomy import blocks

TIMES = 6
"""Blocks of the grown target for each of the model's own."""
EXIT = 13
"""Blocks that draft in what is trained: three of the model's own five."""
SHARED = {"batch_size": 16, "eval_every_steps": 0, "optimizer": "muon", "num_threads": 1}
TRAINED: Mapping[str, dict[str, Any]] = {
    "kangaroo": {
        "drafter": {"kind": "kangaroo", "exit_layer": EXIT},
        "train": {**SHARED, "lr": 1e-2},
    },
    "early_exit": {
        "drafter": {
            "kind": "early_exit",
            "exit_layer": EXIT,
            "rotation": TIMES,
            "tune": {
                "lora": {
                    "rank": 8,
                    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                }
            },
        },
        "train": {**SHARED, "lr": 3e-3},
    },
}


def grown(model: str, out: Path) -> Path:
    """Write the model with blocks that do nothing after each of its own; return the folder."""
    folder = out / "target"
    if folder.exists():
        return folder
    target = Target.load(TargetSettings(model=model))
    whole, stack = target.model, blocks(target.model)
    made = torch.nn.ModuleList()
    for block in stack:
        made.append(block)
        for _ in range(TIMES - 1):
            idle = copy.deepcopy(block)
            torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
            torch.nn.init.zeros_(idle.mlp.down_proj.weight)
            made.append(idle)
    for number, block in enumerate(made):
        block.self_attn.layer_idx = number
    whole.model.layers = made
    whole.config.num_hidden_layers = len(made)
    whole.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return folder


def fitted(name: str, out: Path, target: Path, arguments: argparse.Namespace) -> Path:
    """Train a kind on texts of the target, if that was not done; return its run folder."""
    if (out / name / "drafter").exists():
        return out / name
    recipe = the_recipe(
        argparse.Namespace(out=out, model=target, records=arguments.records, steps=0, loss="forward_kl")
    )
    recipe |= {"name": name, **TRAINED[name], "export": {}}
    recipe["train"]["max_steps"] = arguments.steps  # type: ignore[index]
    data: dict[str, Any] = recipe["data"]  # type: ignore[assignment]
    first = next(iter(TRAINED))
    if name != first:
        data |= {"generate": None, "sources": [{"kind": "generated", "path": str(out / first / "data" / "generated")}]}
    path = out / f"{name}.yaml"
    # What counts is decoded below, in turns with the others.
    own: dict[str, Any] = recipe["eval"]  # type: ignore[assignment]
    own |= {"num_prompts": 2, "max_new_tokens": 16, "temperatures": [0], "speed_prompts": 0, "start": False}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "drafttrain", "fit", str(path), "--runs", str(out)], check=True)
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return out / name


def free(num_blocks: int, *, drafter: Drafter | None = None) -> list[tuple[str, Source, Any]]:
    """Return (label, what drafts, length policy) of what needs no training; with a drafter: on the target that it tuned."""
    long = FixedLengthSettings(8)
    unsure = ConfidenceSettings(threshold=0.4, max_tokens=8)
    own: dict[str, Any] = {} if drafter is None else {"model": "drafter"}
    exits = [EXIT] if drafter is not None else [num_blocks * part // 30 for part in (13, 19, 25)]
    settings: list[tuple[Any, Any]] = [
        (DelSettings(**own), long),
        (DelSettings(costs="blocks", **own), long),
        (DelSettings(stops=False, **own), long),
        *((EarlyExitProposerSettings(exit_layer=one, **own), unsure) for one in exits),
    ]
    if drafter is None:
        settings += [(SwiftSettings(), unsure)]
    return [(TrainingFree(one).label, TrainingFree(one, drafter), length) for one, length in settings]


def row(arm: Arm, plain: Arm, label: str) -> dict[str, Any]:
    """Return the figures of one way."""
    rounds = [one for generation in arm.generations for one in generation.rounds]
    tokens = [len(generation.tokens) for generation in arm.generations]
    passes = sum(event.shape.num_layers for event in arm.ledger.rounds())
    heads = sum(event.shape.head_rows > 0 for event in arm.ledger.rounds())
    fast = speedup(arm, Baseline("plain", *plain.tokens_and_seconds()))
    same = sum(list(a.tokens) == list(b.tokens) for a, b in zip(arm.generations, plain.generations, strict=True))
    return {
        "way": label,
        "length": length_label(arm.length),
        "block_efficiency": ratio_interval(tokens, [len(one.rounds) for one in arm.generations]).text(),
        "accepted": sum(one.num_accepted for one in rounds) / max(1, sum(one.num_draft_tokens for one in rounds)),
        "tokens_per_30_passes": 30 * sum(tokens) / passes,
        "head_calls_per_token": heads / sum(tokens),
        "tokens_per_second": sum(tokens) / sum(one.seconds - one.prefill_seconds for one in arm.generations),
        "speedup": f"{fast.value:.2f} [{fast.low:.2f}, {fast.high:.2f}]",
        "same_text": f"{same}/{len(tokens)}",
    }


def main() -> None:
    """Train what is to be trained, decode, print one row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="folder of a small Llama to grow")
    parser.add_argument("--target", help="a target to decode as it is, in place of --model")
    parser.add_argument("--prompts", help="default: openings that the model writes")
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--kinds", nargs="*", default=list(TRAINED), choices=list(TRAINED), help="what is trained")
    parser.add_argument("--num", type=int, default=16, help="prompts")
    parser.add_argument("--new", type=int, default=96, help="new tokens of each")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.target is None):
        parser.error("give --model or --target")
    torch.set_num_threads(1)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    drafters: dict[str, Drafter] = {}
    if arguments.model is not None:
        folder = grown(arguments.model, out)
        if not (out / "train.jsonl").exists():
            openings(str(folder), out, arguments.records)
        runs = {name: fitted(name, out, folder, arguments) for name in arguments.kinds}
        target = Target.load(TargetSettings(model=str(folder), dtype=arguments.dtype))
        drafters = {name: read_drafter(run / "drafter", target) for name, run in runs.items()}
    else:
        target = Target.load(TargetSettings(model=arguments.target, dtype=arguments.dtype))
    num_blocks = len(blocks(target.model))
    ways = [(target, *way) for way in free(num_blocks)]
    unsure = ConfidenceSettings(threshold=0.4, max_tokens=8)
    ways += [(one.adapted(target), f"{name}, trained", one, unsure) for name, one in drafters.items()]
    if (tuned := drafters.get("early_exit")) is not None:
        ways += [
            (tuned.adapted(target), f"{label}, trained", source, length)
            for label, source, length in free(num_blocks, drafter=tuned)[:3]
        ]
    prompts = read_prompts(
        arguments.prompts or str(out / "test.jsonl"), target.tokenizer, prompt_tokens=None, limit=arguments.num
    )
    rows: list[dict[str, Any]] = []
    for temperature in arguments.temperatures:
        for standing, label, source, length in ways:
            settings = replace(EvalSettings(), max_new_tokens=arguments.new, speed_prompts=0, repetition_ngram=0)
            sampling = Sampling(temperature)
            plain = Arm.create("plain", PLAIN, standing, sampling, settings, length=length)
            arm = Arm.create(label, source, standing, sampling, settings, length=length)
            decode([plain, arm], prompts, settings, generate=0)
            found = {"temperature": temperature, **row(arm, plain, label)}
            found["plain_tokens_per_second"] = row(plain, plain, "plain")["tokens_per_second"]
            rows.append(found)
            print(json.dumps(found), flush=True)
    keys = list(rows[0])
    print(f"\n| {' | '.join(keys)} |\n{'|---' * len(keys)}|")
    for one in rows:
        print(
            "| "
            + " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in one.values())
            + " |"
        )
    print(f"\n{processor()}, commit {commit()}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
