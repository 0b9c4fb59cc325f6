"""Searches over written steps at equal budgets of target tokens: A*, best of n, particle filtering on the embedded adder. LOSSY.

    python benchmarks/search.py OUT [--num-prompts 16] [--temperature 2.5] [--budgets 200 400 800] [--noise 0.1]

The reward reads the last written step and returns 0.9 if its sum, its digit and its carry are right, else 0.1; a share of rewards,
`--noise`, is the other way round. It does not know the answer.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import drafttrain
from drafttrain.core.console import table
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.checkers.numeric import Numeric, NumericSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.page import write_picture
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.search.frontier import SearchResult, search_frontier
from drafttrain.eval.search.methods import Method, a_star, best_of_n, particle_filter
from drafttrain.eval.search.steps import SampledSteps
from drafttrain.eval.typed_json import to_json

RIGHT, WRONG = 0.9, 0.1
METHODS: dict[str, Method] = {
    "a_star, width 2": partial(a_star, width=2),
    "a_star, width 4": a_star,
    "best_of_n": best_of_n,
    "particle_filter, 4 particles": particle_filter,
}


def main() -> None:
    """Search, print and write search.json and search.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=2.5)
    parser.add_argument("--budgets", type=int, nargs="+", default=[200, 400, 800])
    parser.add_argument("--noise", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = drafttrain.load_target("builtin:adder")
    drafter = drafttrain.load_drafter("builtin:adder_drafter", target)
    prompts = read_prompts("builtin:addition_test", target.tokenizer, prompt_tokens=None, limit=arguments.num_prompts)
    steps = SampledSteps(
        target,
        drafter.proposer(target),
        sampling=Sampling(arguments.temperature),
        delimiter=".",
        max_step_tokens=24,
        max_new_tokens=64,
        policy=FixedLength(FixedLengthSettings(2)),
    )

    def reward(prompt: str, texts: Sequence[str]) -> list[float]:
        return [step_reward(prompt, text, noise=arguments.noise) for text in texts]

    checker = Numeric(NumericSettings(spaced_digits=True))
    result = search_frontier(target, steps, prompts, reward, checker, arguments.budgets, methods=METHODS)
    show(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "search.json", to_json(result))
    write_picture(arguments.out / "search.png", lambda axes: draw(axes[0], result), columns=1, height=3.2)
    print(f"commit {commit()}")


def step_reward(prompt: str, text: str, *, noise: float) -> float:
    """Return the reward of the last step of a text."""
    *steps, rest = text.split(".")
    right = last_is_right(
        re.findall(r"\d", prompt), [re.findall(r"\d", step) for step in steps], re.findall(r"\d", rest)
    )
    flipped = stream_seed(0, prompt, text) % 10**6 < noise * 10**6
    return RIGHT if right != flipped else WRONG


def last_is_right(problem: Sequence[str], steps: Sequence[Sequence[str]], answer: Sequence[str]) -> bool:
    """Return whether the last step, or the answer if it is written, follows from what was written before.

    Args:
        steps: The digits of each: two digits and a carry, their sum in two digits, the digit to write, the next carry.
    """
    width = len(problem) // 2
    if answer:
        written = [step[5] for step in reversed(steps) if len(step) == 7]
        return len(steps) == width and len(steps[-1]) == 7 and [*answer] == [steps[-1][6], *written]
    if not steps or len(steps) > width or len(steps[-1]) != 7:
        return False
    place = width - len(steps)
    carry = 0 if len(steps) == 1 else int(steps[-2][6]) if len(steps[-2]) == 7 else -1
    one, other, brought, *total, put, kept = map(int, steps[-1])
    expected = [int(problem[place]), int(problem[width + place]), carry]
    found = 10 * total[0] + total[1]
    return [one, other, brought] == expected and found == sum(expected) and (kept, put) == divmod(found, 10)


def show(result: SearchResult) -> None:
    """Print both tables."""
    rows = [[p.method, p.budget, p.accuracy, p.num_tokens.text(0), p.num_rewards.text(1)] for p in result.points]
    columns = ["method", "budget", "solved", "target tokens", "rewards"]
    table(rows, columns=columns, title=f"LOSSY: {result.num_prompts} prompts")
    differences = [[d.method, d.baseline, d.budget, d.accuracy.text(3)] for d in result.differences]
    table(differences, columns=["method", "less", "budget", "solved"], title="\nPaired over prompts")


def draw(ax: Any, result: SearchResult) -> None:
    """Draw accuracy against target tokens."""
    for method in dict.fromkeys(one.method for one in result.points):
        own = [one for one in result.points if one.method == method]
        values = [one.accuracy for one in own]
        reach = [[one.value - one.low for one in values], [one.high - one.value for one in values]]
        tokens = [one.num_tokens.value for one in own]
        ax.errorbar(tokens, [one.value for one in values], yerr=reach, marker="o", ms=3, capsize=2, lw=1, label=method)
    ax.set(xlabel="target tokens of a prompt", ylabel="solved", title="LOSSY: searches over steps")
    ax.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    main()
