"""Compares the loss curve of each layout with one process without DeepSpeed: `python benchmarks/layouts.py`, from the root."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.training.layouts import curve, run
from tests.training.test_layouts import in_processes

STEPS = 30
LOSS = "forward_kl"
OPTIMIZERS = ("adamw", "muon", "sgd")


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    plain = {
        optimizer: run(folder / optimizer, optimizer=optimizer, steps=STEPS, loss=LOSS) for optimizer in OPTIMIZERS
    }
    layouts: list[dict[str, Any]] = [
        {"stage": stage, "records_per_device": at_once, "optimizer": optimizer, "steps": STEPS, "loss": LOSS}
        for optimizer in OPTIMIZERS
        for at_once in (None, 1)
        for stage in (0, 1, 2, 3)
    ]
    of_two = [(folder / f"two-{number}", layout) for number, layout in enumerate(layouts)]
    in_processes(of_two)
    print("| optimizer | records per device | ZeRO | one process | two processes |\n|---|---|---|---|---|")
    for number, layout in enumerate(layouts):
        reference = plain[layout["optimizer"]]
        one = distance(run(folder / f"one-{number}", **layout), reference)
        two = distance(curve(of_two[number][0]), reference)
        print(
            f"| {layout['optimizer']} | {layout['records_per_device'] or 'all'} | {layout['stage']} | {one:.1e} | {two:.1e} |"
        )
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    print(f"\nlosses {plain['adamw'][0]:.3f} -> {plain['adamw'][-1]:.3f} (adamw), commit {commit.stdout.strip()}")


def distance(losses: list[float], reference: list[float]) -> float:
    """Return the largest difference of a step's loss."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


if __name__ == "__main__":
    main()
