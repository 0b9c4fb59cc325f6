"""Tests whether the intervals cover the true figures, in simulated evaluations, by number of prompts.

    python benchmarks/interval_coverage.py

Each figure has 600 evaluations, and 6,000 for the share in brackets. tests/eval/simulated.py draws the prompts: acceptance rates
differ from prompt to prompt, texts are 4 to 64 tokens long, drafts are accepted token by token, and of two drafters each is better on
other prompts.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.eval.simulated import EQUALS, FIGURES, SHARES, Figure, block_efficiency

from drafttrain.core.provenance import commit, processor
from drafttrain.core.random import stream_seed
from drafttrain.eval.interval import Interval
from drafttrain.online.drift import drift

PROMPTS = (8, 12, 32, 80)
EVALUATIONS = (600, 6000)


def main() -> None:
    """Print the tables."""
    print(f"{datetime.date.today()}, {processor()}, commit {commit()}\n")
    print("| 95 % interval of | " + " | ".join(f"{count} prompts" for count in PROMPTS) + " |")
    print("|---|" + "---|" * len(PROMPTS))
    for name, figure in {**FIGURES, **EQUALS, **SHARES}.items():
        truth = figure.truth(np.random.default_rng(99), num_prompts=300_000)
        print(row(name, figure, lambda one, truth=truth: one.low <= truth <= one.high))
    print("\n| p < 0.05 although both are equal | " + " | ".join(f"{count} prompts" for count in PROMPTS) + " |")
    print("|---|" + "---|" * len(PROMPTS))
    for name, figure in EQUALS.items():
        print(row(name, figure, lambda one: one.p_value < 0.05))  # type: ignore[attr-defined]
    print(
        f"| drift of traffic (permutation), one-sided | {' | '.join(f'{alarms(count):.1f} %' for count in PROMPTS)} |"
    )


def row(name: str, figure: Figure, holds: Callable[[Interval], bool]) -> str:
    """Return how often a condition holds for the estimates of a figure, by number of prompts."""
    cells = []
    for num_prompts in PROMPTS:
        shares = []
        for count in EVALUATIONS:
            generator = np.random.default_rng(stream_seed(0, name, num_prompts))
            found = figure.evaluations(generator, count=count, num_prompts=num_prompts)
            shares.append(100 * float(np.mean([holds(one) for one in found])))
        cells.append(f"{shares[0]:.1f} % ({shares[1]:.1f})")
    return f"| {name} | {' | '.join(cells)} |"


def alarms(num_requests: int) -> float:
    """Return how often drift is detected between requests of the same traffic, in percent."""
    count = EVALUATIONS[0]
    ((tokens, rounds),) = block_efficiency(np.random.default_rng(num_requests), 2 * count * num_requests)
    both = np.stack([tokens, rounds], axis=1).reshape(count, 2, num_requests, 2)
    return 100 * float(np.mean([drift(then, now, resamples=399, seed=0).p_value <= 0.05 for then, now in both]))


if __name__ == "__main__":
    main()
