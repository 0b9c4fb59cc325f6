"""Measures a draft token and a level of a tree of every kind, beside the bare matrix products of the same sizes.

Drafters have random weights and the target's width. A draft token is the difference of two chains, so that reading the committed text
is not part of it; a level of a tree is the difference of two depths. All arms take turns. Times are the thread's own (one thread), so
other programs on the machine disturb them less; with more threads they are wall-clock times.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from drafttrain.core.proposals import Budget, Context, Verdict
from drafttrain.core.provenance import commit, processor
from drafttrain.core.roles import DraftsInTarget
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters import drafters
from drafttrain.drafters.few_rows import product_with
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.cached_lm import CachedLM

KINDS: dict[str, dict[str, Any]] = {
    "eagle3": {"draft_vocab_size": 4096},
    "causal_lm": {"num_layers": 1, "hidden_size": 192, "num_heads": 3},
    "kangaroo": {"exit_layer": 1},
    "medusa": {"num_heads": 5},
}
TREES = {"eagle3", "causal_lm"}
TEXT = 256
"""Committed tokens."""


class Arm:
    """One proposer after a text; `call` drafts once and forgets."""

    def __init__(self, kind: str, target: Target) -> None:
        entry: Any = drafters.entry(kind)
        drafter = entry.component.create(entry.settings(**KINDS[kind]), target=target, tokenizer=target.tokenizer)
        self.proposer = drafter.to(target.model.dtype).eval().proposer(target)
        self.lm = CachedLM(target.model, name="target")
        if isinstance(self.proposer, DraftsInTarget):
            self.proposer.share(self.lm)
        self.context = Context("", torch.randint(1000, (TEXT,)).tolist(), TEXT)
        self.needs = self.proposer.needs
        seen = self.lm.begin([self.context.tokens[:-1]], needs=self.needs)
        self.proposer.begin([self.context], seen)

    def call(self, budget: Budget, clock: Callable[[], float]) -> float:
        """Return the seconds of one draft; then one token is committed."""
        began = clock()
        (proposal,) = self.proposer.propose([budget], Sampling(), [torch.Generator()], lambda step: True)
        seconds = clock() - began
        seen = self.lm.forward(
            [proposal.tokens_N.tolist()],
            parents=[proposal.parents_N.tolist()],
            needs=self.needs | TargetNeeds(logits=True),
            resume=[proposal.resume] if proposal.resume else None,
        )
        self.lm.keep([[0]])
        self.context.tokens.append(7)
        first = TargetOutput(
            hidden_BTD={index: state[:, :1] for index, state in seen[0].hidden_BTD.items()},
            final_BTD=None if seen[0].final_BTD is None else seen[0].final_BTD[:, :1],
        )
        verdict = Verdict([0], [7], "reject", proposal)
        self.proposer.observe([verdict], [first])
        return seconds


def products(rows: int, width: int, wide: int, keys: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the products of an EAGLE-3 layer with a head of 4,096 tokens, and nothing else."""
    sizes = [(2 * width, width + 2 * keys), (width, width), (width, 2 * wide), (wide, width), (width, 4096)]
    layers = [product_with([nn.Linear(*size, bias=False).to(dtype)]) for size in sizes]
    inputs = [torch.randn(1, rows, size[0]).to(dtype) for size in sizes]

    def call() -> None:
        for layer, given in zip(layers, inputs, strict=True):
            layer(given)

    return call


@torch.no_grad()
def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="Folder of a Llama.")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    target = Target.load(TargetSettings(model=str(given.target), dtype=given.dtype))
    config = target.model.config
    keys = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    bare = {
        rows: products(rows, config.hidden_size, config.intermediate_size, keys, target.model.dtype) for rows in (1, 4)
    }
    arms = {kind: Arm(kind, target) for kind in KINDS}
    plain = CachedLM(target.model, name="target")
    plain.begin([[5] * TEXT])
    times: dict[str, list[float]] = {}
    for turn in range(given.turns + 2):
        found = {"target, one token": timed(lambda: plain.forward([[5]]), clock)}
        plain.keep([[]])
        for rows, call in bare.items():
            found[f"products of eagle3, {rows} rows"] = timed(call, clock)
        for kind, arm in arms.items():
            found[f"{kind}, a draft token"] = (arm.call(Budget(5, 5), clock) - arm.call(Budget(1, 1), clock)) / 4
            found[f"{kind}, a chain of 5"] = arm.call(Budget(5, 5), clock)
            if kind in TREES:
                levels = arm.call(Budget(12, 4, 4), clock) - arm.call(Budget(4, 1, 4), clock)
                found[f"{kind}, a level of a tree of 12"] = levels / 3
        for name, seconds in found.items() if turn > 1 else ():  # the first turns warm up
            times.setdefault(name, []).append(seconds)
    print(f"{target.name}, {given.dtype}, {given.threads} threads, {processor()}, commit {commit()}\n")
    print("| ms | minimum | median |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {1000 * min(seconds):.2f} | {1000 * median(seconds):.2f} |")


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Return the seconds of a call."""
    began = clock()
    call()
    return clock() - began


if __name__ == "__main__":
    main()
