"""Decodes the same prompts with every proposer: those that need no training, and a trained drafter in chains, trees and fusion.

    python benchmarks/proposers.py OUT.json [--target builtin:target] [--drafter builtin:drafter] [--prompts builtin:test]
    python benchmarks/proposers.py OUT.json --only token_recycling   # only these rows; all others stay
    python benchmarks/proposers.py OUT.json --only lookahead --again # measured again

Each way of drafting decodes in turns with plain decoding, one prompt at a time, on one thread; a speed-up is over plain decoding in
the same turns. A row is stored as soon as it is measured, and a row that is stored is not measured again: an interrupted command
continues. At the end the whole table is printed. The predicted speed-up is that of `drafttrain advise` on a GPU: its clock, from the
forwards that were recorded here, in 16-bit numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from drafttrain.api import load_drafter, load_target
from drafttrain.core.files import write_json
from drafttrain.core.gpus import MEMORY_AND_BANDWIDTH, gpu_named
from drafttrain.core.proposals import Exactness
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.acceptance.mixed_target import MixedTargetSettings
from drafttrain.eval.arms import Arm, Baseline, decode
from drafttrain.eval.clock import Clock, Efficiency, roofline_of, serial_seconds
from drafttrain.eval.figures import prompt_counts, speedup
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.parity import parity
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers import TrainingFree
from drafttrain.eval.proposers.aded import AdedSettings
from drafttrain.eval.proposers.jacobi import JacobiSettings
from drafttrain.eval.proposers.lookahead import LookaheadSettings
from drafttrain.eval.proposers.ngram import NgramSettings
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.proposers.rapid import RapidSettings
from drafttrain.eval.proposers.rasd import RasdSettings
from drafttrain.eval.proposers.superposed import SuperposedSettings
from drafttrain.eval.proposers.swift import SwiftSettings
from drafttrain.eval.proposers.token_recycling import TokenRecyclingSettings
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.statistics import ratio_interval, ratio_of_ratios
from drafttrain.target_model import Target

CHAIN, LONG_CHAIN, TREE = FixedLengthSettings(), FixedLengthSettings(10), TreeSettings()
WIDE = TreeSettings(num_draft_tokens=80, depth=6, width=8)
SEARCHED = TreeSettings(num_draft_tokens=64, depth=5, width=12)
WINDOW = TreeSettings(num_draft_tokens=56, depth=11, width=8)
THREE_CHAINS = TreeSettings(num_draft_tokens=15, depth=5, width=3)


HALF = RapidSettings(context_tokens=24, chunk_tokens=4, query_tokens=12, first_tokens=4)
"""Reads half of a prompt of 48 tokens."""
NUM_BYTES = 2
"""Of the numbers of weights and caches in the prediction: bfloat16."""
MADE_WITH = ("target", "drafter", "prompts", "num", "new", "gpu")
"""Arguments that all rows of a file share."""


@dataclass(frozen=True)
class Way:
    """A way of drafting."""

    source: Drafter | TrainingFree
    name: str
    length: Any
    rule: Any = field(default_factory=LosslessSettings)

    @property
    def label(self) -> str:
        """Its name; LOSSY if its outputs are not the target's."""
        rule = acceptance_rules.build(self.rule)
        return f"{self.name} (LOSSY)" if rule.exactness is Exactness.LOSSY else self.name

    def works_at(self, temperature: float) -> bool:
        """Return whether its rule has an effect: at temperature 0 a mixed target has none."""
        return temperature > 0 or not isinstance(self.rule, MixedTargetSettings)


def name_of(settings: Any) -> str:
    """Return the label of a proposer, with a shorter one of `HALF`."""
    return TrainingFree(settings).label.replace(TrainingFree(HALF).label, "rapid, half of the prompt")


def ways(drafter: Drafter | None) -> list[Way]:
    """Return all ways, each at the size that its paper uses."""
    free = [
        (NgramSettings(), LONG_CHAIN),
        (TokenRecyclingSettings(), WIDE),
        (TokenRecyclingSettings(warm=True), WIDE),
        (AdedSettings(), SEARCHED),
        (AdedSettings(warm=True), SEARCHED),
        (JacobiSettings(), CHAIN),
        (LookaheadSettings(), WINDOW),
        (RasdSettings(drafter=TokenRecyclingSettings()), WIDE),
        (replace(HALF, model="target"), CHAIN),
        (SwiftSettings(), CHAIN),
    ]
    found = [Way(TrainingFree(one), name_of(one), length) for one, length in free]
    if drafter is not None:
        using = [
            (RasdSettings(), TREE),
            (RasdSettings(chain=True), TREE),
            (SuperposedSettings(), THREE_CHAINS),
            (SuperposedSettings(temperature=1.0, ngram_weight=0.0), THREE_CHAINS),
            (HALF, CHAIN),
        ]
        found += [Way(drafter, "trained drafter", length) for length in (CHAIN, TREE)]
        found += [Way(TrainingFree(one, drafter), name_of(one), length) for one, length in using]
        mixed = MixedTargetSettings()
        found.append(Way(TrainingFree(HALF, drafter), f"{name_of(HALF)}, margin {mixed.margin:g}", CHAIN, mixed))
    return found


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a row."""
    return row["proposer"], row["length"], row["temperature"]


def measured(way: Way, temperature: float, target: Target, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode with one way and by plain decoding, in turns; return the row."""
    settings = EvalSettings(max_new_tokens=arguments.new, speed_prompts=0, rule=way.rule)
    prompts = read_prompts(arguments.prompts, target.tokenizer, prompt_tokens=48, limit=arguments.num)
    sampling, began = Sampling(temperature), time.perf_counter()
    plain = Arm.create("plain", PLAIN, target, sampling, settings, length=CHAIN)
    arm = Arm.create(way.label, way.source, target, sampling, settings, length=way.length)
    decode([plain, arm], prompts, settings, generate=0)
    gpu = gpu_named(arguments.gpu)
    assert gpu is not None, "one of the parser's choices"
    about = {"seconds": time.perf_counter() - began, "commit": commit(), "machine": processor()}
    about["date"] = time.strftime("%Y-%m-%d")
    return row(arm, plain, temperature, settings, roofline_of(gpu, Efficiency())) | about


def row(arm: Arm, plain: Arm, temperature: float, settings: EvalSettings, clock: Clock) -> dict[str, Any]:
    """Return the figures of one arm."""
    counts = prompt_counts(arm, settings)
    rounds = [one for generation in arm.generations for one in generation.rounds]
    tokens = sum(len(generation.tokens) for generation in arm.generations)
    fast = speedup(arm, Baseline("plain", *plain.tokens_and_seconds()))
    predicted = ratio_of_ratios(*(tokens_and_predicted(one, clock) for one in (arm, plain)))
    same = sum(list(a.tokens) == list(b.tokens) for a, b in zip(arm.generations, plain.generations, strict=True))
    near = parity(plain.generations, arm.generations, arm.target).num_near_ties if temperature == 0 else None
    return {
        "proposer": arm.name,
        "length": length_label(arm.length),
        "temperature": temperature,
        "block_efficiency": ratio_interval([c.num_tokens for c in counts], [c.num_rounds for c in counts]).text(),
        "nodes": sum(one.num_draft_tokens for one in rounds) / len(rounds),
        "target_calls_per_token": len(rounds) / tokens,
        "drafter_calls_per_round": arm.ledger.calls("drafter") / len(rounds),
        "speedup": f"{fast.value:.2f} [{fast.low:.2f}, {fast.high:.2f}]",
        "predicted": f"{predicted.value:.2f} [{predicted.low:.2f}, {predicted.high:.2f}]",
        "same_text": same,
        "near_ties": near,
        "prompts": len(arm.generations),
    }


def tokens_and_predicted(arm: Arm, clock: Clock) -> tuple[list[int], list[float]]:
    """Return new tokens of each prompt, and the time of its forwards by a clock. Prefill is not counted."""
    width = NUM_BYTES / arm.target.model.dtype.itemsize
    rounds = [
        [one.at(batch=1, context=one.shape.context, width=width) for one in forwards]
        for forwards in arm.ledger.by_round()
    ]
    seconds = iter(serial_seconds(rounds, clock))
    by_prompt = [sum(next(seconds) for _ in generation.rounds) for generation in arm.generations]
    return [len(generation.tokens) for generation in arm.generations], by_prompt


def stored_rows(path: Path, made_with: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier command with the same arguments."""
    if not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    if (earlier := stored.get("made_with")) != made_with:
        raise SystemExit(f"{path}: its rows were made with {earlier}, not with {made_with}: give another file")
    rows: list[dict[str, Any]] = stored["rows"]
    return rows


def print_table(rows: Sequence[dict[str, Any]], *, gpu: str) -> None:
    """Print one Markdown row for each way, with all temperatures."""
    temperatures = list(dict.fromkeys(one["temperature"] for one in rows))
    columns = ["proposer", "length"]
    for temperature in temperatures:
        columns += [f"tau, T {temperature:g}", "nodes", "calls", "speed-up here", f"{gpu}, predicted", "same text"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    by_way: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for one in rows:
        by_way.setdefault((one["proposer"], one["length"]), {})[one["temperature"]] = one
    for (name, length), found in by_way.items():
        cells = [name if name.startswith("trained") else f"`{name}`", length]
        for temperature in temperatures:
            cells += _cells(found[temperature]) if temperature in found else ["-"] * 6
        print(f"| {' | '.join(cells)} |")


def _cells(one: dict[str, Any]) -> list[str]:
    same = f"{one['same_text']}/{one['prompts']}" + (f", {one['near_ties']} near ties" if one["near_ties"] else "")
    counts = [f"{one['nodes']:.1f}", f"{one['target_calls_per_token']:.2f}"]
    return [one["block_efficiency"], *counts, one["speedup"], one["predicted"], same]


def main() -> None:
    """Measure the rows that are not stored yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument(
        "--drafter", default=None, help="a drafter folder; without one only what needs no training runs"
    )
    parser.add_argument("--prompts", default="builtin:test")
    parser.add_argument("--num", type=int, default=12, help="prompts")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each")
    parser.add_argument("--gpu", default="h100", choices=MEMORY_AND_BANDWIDTH)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="measure only ways whose name contains one of these words"
    )
    parser.add_argument("--again", action="store_true", help="measure these rows again, also if they are stored")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made_with = {name: getattr(arguments, name) for name in MADE_WITH}
    rows = {key_of(one): one for one in stored_rows(arguments.out, made_with)}
    target = load_target(arguments.target)
    drafter = load_drafter(arguments.drafter, target) if arguments.drafter else None
    every = [(way, t) for way in ways(drafter) for t in arguments.temperatures if way.works_at(t)]
    for way, temperature in every:
        key = (way.label, length_label(way.length), temperature)
        wanted = any(word in way.label for word in arguments.only)
        if wanted and (arguments.again or key not in rows):
            rows[key] = measured(way, temperature, target, arguments)
            print(f"{way.label}, temperature {temperature:g}: {rows[key]['seconds']:.0f} s", flush=True)
            write_json(arguments.out, {"made_with": made_with, "rows": list(rows.values())})
    order = [(way.label, length_label(way.length), temperature) for way, temperature in every]
    print_table([rows[key] for key in order if key in rows], gpu=arguments.gpu)
    print({(one["commit"], one["machine"], one["date"]) for one in rows.values()})
    print(f"{sum(one['seconds'] for one in rows.values()):.0f} s of measurements")


if __name__ == "__main__":
    main()
