"""Compares acceptance in a serving engine with the embedded evaluator: greedy chains, 32 prompts of 128 tokens.

    python benchmarks/serving.py runs/tiny_eagle3/drafter runs/tiny_eagle/drafter runs/tiny_medusa/drafter
    python benchmarks/serving.py runs/demo/drafter --format gguf
    python benchmarks/serving.py runs/demo/drafter --format hf --engine transformers

It writes DRAFTER.FORMAT, runs the engines that read it (drafttrain engines install vllm llama.cpp openvino), and prints the rows of
`serving.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from drafttrain.checkpoint import read_about
from drafttrain.commands.export import convert_drafter
from drafttrain.core.errors import GateError


def main() -> None:
    """Run the engines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafters", nargs="+", type=Path)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--format", default="vllm")
    parser.add_argument("--engine", help="run only this engine of those that read the format")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    overrides = [f"export.verify_prompts={arguments.prompts}", f"export.verify_tokens={arguments.tokens}"]
    overrides += [f"export.verify=[{arguments.engine}]"] if arguments.engine else []
    print(
        "| engine | drafter | K | drafts | draft tokens | accepted | accepted by position | block efficiency in the engine | evaluator "
        "| T=1, drafts | engine | evaluator | p |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in arguments.drafters:
        try:
            convert_drafter(
                str(folder), [arguments.format], overrides, target=arguments.target, verify=True, speed=False, out=None
            )
        except GateError as error:
            print(error)
        for one in json.loads((folder / "engine.json").read_text(encoding="utf-8")):
            print(row(folder, one))


def row(folder: Path, one: dict) -> str:
    """Return the row of one comparison."""
    about = read_about(folder)
    sides = [one["greedy"]["engine"], one["greedy"]["evaluator"]]
    keys = ("num_drafts", "num_draft_tokens", "num_accepted", "accepted_at")
    counts = [" / ".join(dict.fromkeys(str(side[key]) for side in sides)) for key in keys]
    sampled = ["not run", "", "", ""]
    if part := one["sampled"]:
        figures = [f"{part[side]['block_efficiency']:.3f}" for side in ("engine", "evaluator")]
        sampled = [one["draft"], *figures, f"{part['p_value']:.2f}"]
    cells = [
        f"{one['engine']} {one['version']}",
        about.kind if about else "causal_lm",
        one["num_draft_tokens"],
        *counts,
        *(f"{side['block_efficiency']:.3f}" for side in sides),
        *sampled,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
