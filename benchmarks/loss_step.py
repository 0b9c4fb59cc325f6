"""Compares training steps of EAGLE-3 before and after a change: two checkouts run in two processes and take turns.

    git worktree add ../before 1e0117c
    python benchmarks/loss_step.py ../before

Both train the same start on the same texts. Each case is measured with the target run in the step, and with its states stored.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from loss_step_worker import CASES

from drafttrain.core.provenance import commit, processor
from drafttrain.eval.statistics import ratio_of_ratios

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    arguments = parser.parse_args()
    print(
        f"{arguments.pairs} pairs, one thread each, {processor()}, commits {_commit(arguments.before)} and {commit()}\n"
    )
    print(
        "| case | target | before | after | before / after [95 %] | largest difference of a loss | memory before, after |"
    )
    print("|---|---|---|---|---|---|---|")
    shares = []
    for case in arguments.cases:
        for stored in (False, True):
            found = measured(arguments.before, case, stored=stored, pairs=arguments.pairs)
            print(row(case, stored, found), flush=True)
            shares.append((case, stored, found))
    print("\nCPU milliseconds per step, before -> after:\n")
    print(
        "| case | target | reading the target | drafter | loss | backward | optimizer |\n|---|---|---|---|---|---|---|"
    )
    for case, stored, found in shares:
        print(parts_row(case, stored, found))


def measured(before: Path, case: str, *, stored: bool, pairs: int) -> list[list[dict[str, Any]]]:
    """Return the turns of both sides. Times leave out the first pair, which warms up; losses include it."""
    sides = [_start(folder, case, stored) for folder in (before, HERE.parent)]
    turns: list[list[dict[str, Any]]] = [[], []]
    for pair in range(pairs + 1):
        for side in (0, 1) if pair % 2 else (1, 0):
            turns[side].append(_turn(sides[side]))
    for side in sides:
        assert side.stdin is not None
        side.stdin.close()
        side.wait()
    return turns


def row(case: str, stored: bool, turns: list[list[dict[str, Any]]]) -> str:
    """Return a row of the table of ratios."""
    times = [[turn["cpu_seconds"] for turn in side[1:]] for side in turns]
    ones = [1.0] * len(times[0])
    ratio = ratio_of_ratios((times[0], ones), (times[1], ones))
    pairs = [
        (a, b) for one, other in zip(*turns, strict=True) for a, b in zip(one["losses"], other["losses"], strict=True)
    ]
    difference = max(abs(a - b) / abs(a) for a, b in pairs)
    before, after = (1000 * sum(side) / len(side) for side in times)
    memory = ", ".join(f"{side[-1]['peak_mb']:.0f}" for side in turns)
    return f"| {case} | {_how(stored)} | {before:.0f} ms | {after:.0f} ms | {ratio} | {difference:.1e} | {memory} MB |"


def parts_row(case: str, stored: bool, turns: list[list[dict[str, Any]]]) -> str:
    """Return a row of the table of parts."""
    names = ("target", "drafter", "loss", "backward", "optimizer")
    means = [
        [1000 * sum(turn["parts"][name] for turn in side[1:]) / (len(side) - 1) for name in names] for side in turns
    ]
    cells = " | ".join(f"{a:.0f} -> {b:.0f}" for a, b in zip(*means, strict=True))
    return f"| {case} | {_how(stored)} | {cells} |"


def _how(stored: bool) -> str:
    return "stored" if stored else "run"


def _start(folder: Path, case: str, stored: bool) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "loss_step_worker.py"), case, *(["--stored"] if stored else [])]
    environment = os.environ | {"PYTHONPATH": str(folder.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _turn(side: subprocess.Popen[str]) -> dict[str, Any]:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write("\n")
    side.stdin.flush()
    answer: dict[str, Any] = json.loads(side.stdout.readline())
    return answer


def _commit(folder: Path) -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
