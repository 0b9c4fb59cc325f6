"""Compares adaptive draft lengths by an acceptance head with the best fixed length of a grid, paired over prompts.

    drafttrain fit tiny_acceptance
    python benchmarks/adaptive_length.py runs/tiny_acceptance/head --target builtin:target --drafter builtin:drafter

Settings of both sides (the fixed length and the threshold) are chosen on the first half of the prompts. The figures are measured
on the second half. Tokens per cost are tokens / (target calls + c x draft tokens). c is the cost of a draft token in target calls
and covers everything in a round except the verifying call. So the figure does not depend on how busy the machine is. Decoding is
greedy and lossless.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.core.console import progress, table
from drafttrain.core.generations import Generation
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.cumulative_reject import CumulativeReject, CumulativeRejectSettings
from drafttrain.eval.length.expected_cost import ExpectedCost, ExpectedCostSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.statistics import ratio_difference, ratio_interval
from drafttrain.heads.folder import check_made_for
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.folders import resolve_folder

FIXED = (1, 2, 3, 4, 5, 6, 8, 10)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_TOKENS = 12


def decode(
    target: Target, drafter: Any, policy: Any, prompts: Sequence[Prompt], *, new: int, together: int
) -> list[Generation]:
    """Return the outputs of one arm."""
    engine = Engine(
        target, drafter.proposer(target), rule=Lossless(), policy=policy, sampling=Sampling(), max_new_tokens=new
    )
    groups = [prompts[start : start + together] for start in range(0, len(prompts), together)]
    return [one for group in groups for one in engine.generate(group)]


def tokens_and_cost(found: Sequence[Generation], c: float) -> tuple[list[float], list[float]]:
    """Return tokens and cost by prompt, in target calls."""
    costs = [len(one.rounds) + c * sum(part.num_draft_tokens for part in one.rounds) for one in found]
    return [float(len(one.tokens)) for one in found], costs


def per_cost(found: Sequence[Generation], c: float) -> float:
    """Return tokens per cost."""
    tokens, costs = tokens_and_cost(found, c)
    return sum(tokens) / sum(costs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("head", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", default="builtin:test")
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--together", type=int, default=8, help="Prompts decoded together.")
    parser.add_argument("--costs", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    chosen = parser.parse_args()
    target = Target.load(TargetSettings(model=chosen.target))
    drafter = read_drafter(resolve_folder(chosen.drafter), target).eval()
    check_made_for(chosen.head, target=target, drafter=resolve_folder(chosen.drafter))
    prompts = read_prompts(chosen.prompts, target.tokenizer, prompt_tokens=48, limit=chosen.num_prompts)
    half = len(prompts) // 2
    head = str(chosen.head)
    policies: dict[str, Any] = {f"fixed {k}": FixedLength(FixedLengthSettings(k)) for k in FIXED}
    for h in THRESHOLDS:
        settings = CumulativeRejectSettings(threshold=h, max_tokens=MAX_TOKENS, head=head)
        policies[f"cumulative_reject {h:g}"] = CumulativeReject(settings)
    for c in chosen.costs:
        weighed = ExpectedCostSettings(draft_cost=c, target_cost=1.0, max_tokens=MAX_TOKENS, head=head)
        policies[f"expected_cost {c:g}"] = ExpectedCost(weighed)
    found: dict[str, list[Generation]] = {}
    with progress("decoding", total=len(policies), unit="arms") as bar:
        for name, policy in policies.items():
            found[name] = decode(target, drafter, policy, prompts, new=chosen.new, together=chosen.together)
            bar.advance(1)
    assert all([g.tokens for g in arm] == [g.tokens for g in found["fixed 1"]] for arm in found.values())
    rows = []
    for c in chosen.costs:
        best = {
            kind: max(
                (name for name in found if name.startswith(kind)), key=lambda name: per_cost(found[name][:half], c)
            )
            for kind in ("fixed", "cumulative_reject")
        }
        best["expected_cost"] = f"expected_cost {c:g}"
        for name in best.values():
            own, fixed = (tokens_and_cost(found[one][half:], c) for one in (name, best["fixed"]))
            rounds = [len(one.rounds) for one in found[name][half:]]
            rows.append(
                [
                    f"{c:g}",
                    name,
                    f"{sum(own[0]) / sum(rounds):.2f}",
                    str(ratio_interval(*own)),
                    str(ratio_difference(own, fixed)),
                ]
            )
    columns = ["c", "lengths", "block efficiency", "tokens per cost", "minus the best fixed length, paired"]
    table(rows, columns=columns, title=f"{chosen.target}, {chosen.drafter}; {len(prompts) - half} prompts, greedy")
