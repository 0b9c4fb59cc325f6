"""Trains a drafter for a target from elsewhere, stories260K: at most 50,000 parameters and three minutes of training.

The target generates openings of stories (24 tokens, temperature 1). They are split by number: most for training, 64 for validation,
64 for the test. The target continues the training openings at the menu of temperatures, and the drafter is trained from scratch on
these texts.

To compare all kinds on this target, pass --stages with nothing after it, then run kinds.py --recipe OUT/stories260k.yaml.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.target_model import Target, TargetSettings

OPENING, TEST = 24, 64


def main() -> None:
    """Write openings and a recipe, run the stages one by one, print the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of stories260K")
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--loss", default="forward_kl")
    parser.add_argument(
        "--stages", nargs="*", default=["gen", "fit"], help="no stage: write only openings and recipe, for kinds.py"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    openings(arguments.model, arguments.out, arguments.records)
    print(f"openings: {time.perf_counter() - began:.0f} s")
    recipe = arguments.out / "stories260k.yaml"
    recipe.write_text(yaml.safe_dump(the_recipe(arguments), sort_keys=False), encoding="utf-8")
    for stage in arguments.stages:
        began = time.perf_counter()
        command = [sys.executable, "-m", "drafttrain", stage, str(recipe), "--runs", str(arguments.out)]
        subprocess.run(command, check=True)
        print(f"{stage}: {time.perf_counter() - began:.0f} s")


def openings(model: str, out: Path, records: int) -> None:
    """Write the openings of three disjoint sets of stories."""
    target = Target.load(TargetSettings(model=model))
    start = target.tokenizer.bos_token_id
    count = records + 2 * TEST
    tasks = [Task(f"story-{i}", [start], Sampling(1.0)) for i in range(count)]
    lines = []
    for first in range(0, count, 128):
        texts = continuations(tasks[first : first + 128], target, max_new_tokens=OPENING - 1, seed=0)
        for task, new in zip(tasks[first : first + 128], texts, strict=True):
            lines.append(json.dumps({"id": task.id, "tokens": [start, *new]}))
    (out / "test.jsonl").write_text("\n".join(lines[:TEST]), encoding="utf-8")
    (out / "validation.jsonl").write_text("\n".join(lines[TEST : 2 * TEST]), encoding="utf-8")
    (out / "train.jsonl").write_text("\n".join(lines[2 * TEST :]), encoding="utf-8")


def the_recipe(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the recipe."""
    out = arguments.out
    return {
        "name": "stories260k",
        "target": {"model": str(arguments.model)},
        "drafter": {
            "kind": "causal_lm",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_layers": 1,
            "num_heads": 3,
        },
        "loss": {"kind": arguments.loss},
        "data": {
            "max_length": 160,
            "generate": {
                "prompts": {"kind": "jsonl", "path": str(out / "train.jsonl")},
                "prompt_tokens": None,
                "num_records": arguments.records,
                "max_new_tokens": 128,
                "batch_size": 64,
            },
            "sources": [{"kind": "generated"}],
            "cache": "states",
            # Stories of one author share openings with each other; the prompts themselves are never trained on.
            "overlap_ngram": 0,
        },
        "train": {
            "max_steps": arguments.steps,
            "batch_size": 32,
            "optimizer": "muon",
            "lr": 0.01,
            "schedule": "wsd",
            "decay_fraction": 0.4,
            "eval_every_steps": 100,
            "num_threads": 1,
        },
        "eval": {
            "prompts": str(out / "test.jsonl"),
            "validation_prompts": str(out / "validation.jsonl"),
            "prompt_tokens": None,
        },
        "export": {"require": {"block_efficiency": 2.3, "parity": True}},
    }


if __name__ == "__main__":
    main()
