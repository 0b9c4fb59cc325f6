"""Sampled trees beside a chain of as many nodes: tokens a target call, paired over prompts, and where trees begin to pay.

Real drafters decode at temperatures 0 and 1. Then the target drafts for itself with noise in its weights, from little to much: so the
acceptance rate of a draft token goes from high to low while everything else stays, and the crossover of trees and chain shows.

    python benchmarks/sampled_trees.py OUT --stories MODEL [--eagle DRAFTER] [--prompts 24] [--new-tokens 48]

MODEL is the folder of stories260K, DRAFTER one that `kinds.py` trained for it. Prompts of stories are written by the target itself.
With `--parts` several processes share the work.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from drafttrain.checkpoint import read_drafter
from drafttrain.core.generations import Generation
from drafttrain.core.provenance import commit, processor
from drafttrain.core.random import stream
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.interval import Interval
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length import length_policies
from drafttrain.eval.length.dyspec import DySpecSettings
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.rsd_c import RsdCSettings
from drafttrain.eval.length.rsd_s import RsdSSettings
from drafttrain.eval.length.sequoia import Sequoia, SequoiaSettings
from drafttrain.eval.length.specinfer import SpecInferSettings
from drafttrain.eval.length.static_tree import Shape
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.settings import length_label
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder

NODES = 8
CHAIN = FixedLengthSettings(NODES)
TREES = (
    RsdCSettings([2, 1, 1, 1]),
    RsdSSettings(2, depth=4),
    DySpecSettings(NODES, width=4),
    DySpecSettings(NODES, threshold=0.1, width=4),
    SpecInferSettings([2, 1, 1, 1]),
    TreeSettings(NODES, depth=5, width=4),
)
"""All have as many nodes as the chain, at most."""

NOISE = (0.03, 0.08, 0.14, 0.2, 0.3)
"""Of the drafters of the crossover: standard deviation in that of each weight matrix."""

PARTS = ("crossover", "eagle", "builtin")


@dataclass(frozen=True)
class Pair:
    """A drafter and its target, with prompts."""

    name: str
    target: Target
    drafter: Any
    prompts: Sequence[Prompt]
    validation: Sequence[Prompt]
    """Sequoia's acceptance by rank is measured on these."""


@dataclass(frozen=True)
class Decoded:
    """One way of drafting for a pair at a temperature."""

    label: str
    generations: Sequence[Generation]
    drafter_calls: float
    """A round."""

    @property
    def part(self) -> tuple[list[float], list[float]]:
        """Tokens and rounds by prompt."""
        found = self.generations
        return [float(len(one.tokens)) for one in found], [float(len(one.rounds)) for one in found]

    @property
    def alpha(self) -> float:
        """The share of accepted draft tokens among those tested, of a chain."""
        rounds = [one for generation in self.generations for one in generation.rounds]
        accepted = sum(one.num_accepted for one in rounds)
        return accepted / (accepted + sum(one.num_accepted < one.max_depth for one in rounds))

    @property
    def nodes(self) -> float:
        """Draft tokens a round."""
        rounds = [one for generation in self.generations for one in generation.rounds]
        return sum(one.num_draft_tokens for one in rounds) / len(rounds)


def main() -> None:
    """Decode, print the tables, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stories", required=True)
    parser.add_argument("--eagle", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stories = Target.load(TargetSettings(model=arguments.stories))
    texts = openings(stories, 2 * arguments.prompts)
    of_stories = (texts[: arguments.prompts], texts[arguments.prompts :])

    print("| drafter | temperature | alpha | draft | block efficiency | above the chain | nodes | drafter calls |")
    print("|---|---|---|---|---|---|---|---|")
    crossover: dict[str, list[tuple[float, Interval]]] = {}
    for noise in NOISE if "crossover" in arguments.parts else ():
        pair = Pair(f"stories260K, noise {noise:g}", stories, self_drafter(stories, noise), *of_stories)
        chain, *trees = report(pair, 1.0, arguments.new_tokens)
        for one in trees:
            kind = one.label.split(",")[0] + (" threshold" if "threshold" in one.label else "")
            crossover.setdefault(kind, []).append((chain.alpha, ratio_difference(one.part, chain.part)))
    if crossover:
        plot(crossover, arguments.out / "sampled_trees.png")
    for pair in real_pairs(arguments, stories, of_stories):
        for temperature in (0.0, 1.0):
            report(pair, temperature, arguments.new_tokens)
    print(f"\n{arguments.prompts} prompts, {arguments.new_tokens} new tokens, {processor()}, commit {commit()}")


def real_pairs(arguments: argparse.Namespace, stories: Target, of_stories: Any) -> Any:
    """Yield the pairs whose drafters were trained."""
    if arguments.eagle is not None and "eagle" in arguments.parts:
        yield Pair("stories260K, eagle3", stories, read_drafter(arguments.eagle, stories), *of_stories)
    if "builtin" not in arguments.parts:
        return
    target = Target.load(TargetSettings(model="builtin:target"))
    prompts, validation = (
        read_prompts(name, target.tokenizer, prompt_tokens=48, limit=arguments.prompts)
        for name in ("builtin:test", "builtin:validation")
    )
    drafter = read_drafter(resolve_folder("builtin:drafter"), target)
    yield Pair("builtin, causal_lm", target, drafter, prompts, validation)


def openings(target: Target, count: int) -> list[Prompt]:
    """Return the first 24 tokens of texts that the target writes."""
    begin = [target.tokenizer.bos_token_id]
    tasks = [Task(str(number), begin, Sampling(1.0)) for number in range(count)]
    return [
        Prompt(str(number), [*begin, *one])
        for number, one in enumerate(continuations(tasks, target, max_new_tokens=23, seed=0))
    ]


def self_drafter(target: Target, noise: float) -> CausalLMDrafter:
    """Return the target with noise in its weight matrices, as a drafter."""
    model = copy.deepcopy(target.model)
    generator = stream(0, "noise")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return CausalLMDrafter(model)


def report(pair: Pair, temperature: float, new_tokens: int) -> list[Decoded]:
    """Decode with the chain and with every tree, print a row for each, and return them."""
    best = SequoiaSettings(NODES, acceptance=acceptance(pair, temperature, new_tokens))
    found = [decoded(pair, one, temperature, new_tokens) for one in (CHAIN, *TREES, best)]
    chain = found[0]
    for one in found:
        above = "" if one is chain else ratio_difference(one.part, chain.part).text()
        label = f"{one.label} {drawn(Sequoia(best).shape)}" if one is found[-1] else one.label
        print(
            f"| {pair.name} | {temperature:g} | {chain.alpha:.2f} | {label} | {ratio_interval(*one.part).text()} "
            f"| {above} | {one.nodes:.1f} | {one.drafter_calls:.1f} |",
            flush=True,
        )
    return found


def acceptance(pair: Pair, temperature: float, new_tokens: int) -> list[float]:
    """Return the acceptance of the first, second, ... child, measured on the validation prompts."""
    policy = Sequoia(SequoiaSettings(2 * NODES, width=4))
    run(pair, policy, temperature, new_tokens, pair.validation, Ledger())
    return [round(one, 4) for one in policy.counts.acceptance()]


def decoded(pair: Pair, settings: Any, temperature: float, new_tokens: int) -> Decoded:
    """Decode the test prompts with one length policy."""
    ledger = Ledger()
    generations = run(pair, length_policies.build(settings), temperature, new_tokens, pair.prompts, ledger)
    label = "sequoia" if isinstance(settings, SequoiaSettings) else length_label(settings)
    return Decoded(label, generations, ledger.calls("drafter") / ledger.calls("target"))


def run(
    pair: Pair, policy: Any, temperature: float, new_tokens: int, prompts: Sequence[Prompt], ledger: Ledger
) -> list[Generation]:
    """Decode prompts together."""
    engine = Engine(
        pair.target,
        pair.drafter.proposer(pair.target, ledger.append),
        rule=Lossless(),
        policy=policy,
        sampling=Sampling(temperature),
        max_new_tokens=new_tokens,
        listener=ledger.append,
        stop_tokens=(),
    )
    return engine.generate(prompts)


def drawn(shape: Shape | None) -> str:
    """Return a shape as text: `(()(()))` is two children, the second with a child."""
    return "(" + "".join(map(drawn, shape or ())) + ")"


def plot(crossover: dict[str, list[tuple[float, Interval]]], file: Path) -> None:
    """Draw, for every tree, its advantage over the chain by the acceptance rate of a draft token."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    line: Callable[..., Any] = axes.errorbar
    for number, (kind, points) in enumerate(crossover.items()):
        points = sorted(points, key=lambda one: one[0])
        values = [one.value for _, one in points]
        errors = [[one.value - one.low for _, one in points], [one.high - one.value for _, one in points]]
        line(
            [alpha + 0.003 * number for alpha, _ in points],
            values,
            yerr=errors,
            label=kind,
            color=f"C{number}",
            marker="o",
            markersize=3,
            capsize=2,
        )
    axes.set_xlabel("acceptance rate of a draft token of the chain")
    axes.set_ylabel(f"tokens a target call above a chain of {NODES}")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    print(f"wrote {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
