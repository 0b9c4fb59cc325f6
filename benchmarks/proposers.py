"""Decodes the same prompts with every proposer: those that need no training, and a trained drafter in chains, trees and fusion.

    python benchmarks/proposers.py OUT.json [--target builtin:target] [--drafter builtin:drafter] [--prompts builtin:test]

All arms decode in turns in one process, on one thread; a speed-up is over plain decoding in the same turns. Prints one Markdown row
for each arm and temperature. Rows of further clocks can be computed from the counts in OUT.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drafttrain.api import load_drafter, load_target
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.arms import Arm, Baseline, decode
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
from drafttrain.eval.proposers.rasd import RasdSettings
from drafttrain.eval.proposers.token_recycling import TokenRecyclingSettings
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.eval.statistics import ratio_interval
from drafttrain.target_model import Target

CHAIN, LONG_CHAIN, TREE = FixedLengthSettings(), FixedLengthSettings(10), TreeSettings()
WIDE = TreeSettings(num_draft_tokens=80, depth=6, width=8)
SEARCHED = TreeSettings(num_draft_tokens=64, depth=5, width=12)
WINDOW = TreeSettings(num_draft_tokens=56, depth=11, width=8)


@dataclass(frozen=True)
class Way:
    """A way of drafting."""

    source: Drafter | TrainingFree
    name: str
    length: Any


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
    ]
    found = [Way(TrainingFree(one), TrainingFree(one).label, length) for one, length in free]
    if drafter is not None:
        fused = [RasdSettings(), RasdSettings(chain=True)]
        found += [Way(drafter, "trained drafter", length) for length in (CHAIN, TREE)]
        found += [Way(TrainingFree(one, drafter), TrainingFree(one).label, TREE) for one in fused]
    return found


def rows(target: Target, drafter: Drafter | None, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode at each temperature; return the figures of each arm."""
    settings = EvalSettings(max_new_tokens=arguments.new, speed_prompts=0, batch_size=arguments.batch)
    prompts = read_prompts(arguments.prompts, target.tokenizer, prompt_tokens=48, limit=arguments.num)
    found = []
    for temperature in arguments.temperatures:
        sampling = Sampling(temperature)
        plain = Arm.create("plain", PLAIN, target, sampling, settings, length=CHAIN)
        arms = [Arm.create(w.name, w.source, target, sampling, settings, length=w.length) for w in ways(drafter)]
        decode([plain, *arms], prompts, settings, generate=0)
        baseline = Baseline("plain", *plain.tokens_and_seconds())
        found += [row(arm, plain, baseline, temperature, settings) for arm in arms]
    return found


def row(arm: Arm, plain: Arm, baseline: Baseline, temperature: float, settings: EvalSettings) -> dict[str, Any]:
    """Return the figures of one arm."""
    counts = prompt_counts(arm, settings)
    rounds = [one for generation in arm.generations for one in generation.rounds]
    tokens = sum(len(generation.tokens) for generation in arm.generations)
    fast = speedup(arm, baseline)
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
        "same_text": same,
        "near_ties": near,
        "prompts": len(arm.generations),
    }


def main() -> None:
    """Decode, write the figures, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument(
        "--drafter", default=None, help="a drafter folder; without one only what needs no training runs"
    )
    parser.add_argument("--prompts", default="builtin:test")
    parser.add_argument("--num", type=int, default=12)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    target = load_target(arguments.target)
    drafter = load_drafter(arguments.drafter, target) if arguments.drafter else None
    found = rows(target, drafter, arguments)
    about = {"commit": commit(), "machine": processor(), "seconds": time.perf_counter() - began}
    arguments.out.write_text(json.dumps({"rows": found, "about": about}, indent=1), encoding="utf-8")
    print(
        "| proposer | length | T | block efficiency | nodes a round | target calls a token | speed-up here | same text |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for one in found:
        same = f"{one['same_text']}/{one['prompts']}"
        same += f", {one['near_ties']} near ties" if one["near_ties"] else ""
        cells = (
            f"`{one['proposer']}`",
            one["length"],
            f"{one['temperature']:g}",
            one["block_efficiency"],
            f"{one['nodes']:.1f}",
            f"{one['target_calls_per_token']:.2f}",
            one["speedup"],
            same,
        )
        print(f"| {' | '.join(cells)} |")
    print(about)


if __name__ == "__main__":
    main()
