"""Measures what `eval.batch_size: 8` saves: 8 prompts decoded together against one by one, in turns, and compares the tokens.

Seconds are those of this process on the CPU, so that other work on the machine counts less.
"""

import argparse
import time
from datetime import UTC, datetime

import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.core.provenance import commit, processor
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.fixed import FixedLength
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.proposers.none import PLAIN
from drafttrain.eval.statistics import ratio_of_ratios
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder

TOGETHER = 8


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafter", default="builtin:drafter")
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{TOGETHER} prompts of builtin:test, {arguments.max_new_tokens} new tokens, K = 5, {arguments.drafter} on {arguments.target}, "
        f"1 thread, {arguments.repetitions} repetitions in turns, {processor()}, {datetime.now(UTC):%Y-%m-%d}, commit {commit()}\n"
    )
    print("| decoding | temperature | tokens per CPU second, one by one | together | quotient [95 % interval] |")
    print("|---|---|---|---|---|")
    for temperature in (0.0, 1.0):
        for name in ("plain", "drafter"):
            engine, prompts = made(arguments, name, temperature, torch.float32)
            print(f"| {name} | {temperature:g} | {row(engine, prompts, arguments.repetitions)} |", flush=True)
    print("\n| in float64: equal outputs, one by one and together | temperature 0 | temperature 1 |\n|---|---|---|")
    for name in ("plain", "drafter"):
        found = [equal(*made(arguments, name, temperature, torch.float64)) for temperature in (0.0, 1.0)]
        print(f"| {name} | {' | '.join(found)} |", flush=True)


def made(
    arguments: argparse.Namespace, name: str, temperature: float, dtype: torch.dtype
) -> tuple[Engine, list[Prompt]]:
    """Return an engine that decodes the prompts plainly or with the drafter."""
    target = Target.load(TargetSettings(model=arguments.target, device="cpu"))
    source = PLAIN if name == "plain" else read_drafter(resolve_folder(arguments.drafter), target)
    target.model.to(dtype)
    if name == "drafter":
        source.to(dtype)
    engine = Engine(
        target,
        source.proposer(target),
        rule=Lossless(),
        policy=FixedLength(),
        sampling=Sampling(temperature),
        max_new_tokens=arguments.max_new_tokens,
        stop_tokens=(),
    )
    return engine, read_prompts("builtin:test", target.tokenizer, prompt_tokens=48, limit=TOGETHER)


def row(engine: Engine, prompts: list[Prompt], repetitions: int) -> str:
    """Return the cells of the speeds and of their quotient over repetitions."""
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    ways = {"alone": lambda: [engine.generate([one]) for one in prompts], "together": lambda: engine.generate(prompts)}
    for way in ways.values():
        way()  # warms up
    for repetition in range(repetitions):
        for name in sorted(ways, reverse=repetition % 2 == 1):
            began = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - began)
    tokens = [float(len(prompts) * engine.max_new_tokens)] * repetitions
    alone, together = (sum(tokens) / sum(seconds[name]) for name in ways)
    ratio = ratio_of_ratios((tokens, seconds["together"]), (tokens, seconds["alone"]))
    return f"{alone:.0f} | {together:.0f} | {ratio.text()}"


def equal(engine: Engine, prompts: list[Prompt]) -> str:
    """Return how many outputs are equal, token for token."""
    together = engine.generate(prompts)
    alone = [engine.generate([one])[0] for one in prompts]
    same = sum(list(a.tokens) == list(b.tokens) for a, b in zip(together, alone, strict=True))
    return f"{same} of {len(prompts)}"


if __name__ == "__main__":
    main()
