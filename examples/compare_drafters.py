"""Evaluate two drafters on the same prompts and compare them, paired over prompts.

    python examples/compare_drafters.py [DRAFTER_A DRAFTER_B] [--target MODEL]

Without arguments: the embedded drafter against a copy of it that drafts greedily at every temperature.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import drafttrain
from drafttrain.eval.table import show
from drafttrain.target_model.folders import resolve_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafters", nargs="*", metavar="DRAFTER")
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        a, b = arguments.drafters or [
            "builtin:drafter",
            drafting_greedily("builtin:drafter", Path(temporary) / "greedy"),
        ]
        result = drafttrain.evaluate(
            {"A": a, "B": b},
            drafttrain.load_target(arguments.target),
            num_prompts=arguments.num_prompts,
            max_new_tokens=arguments.max_new_tokens,
            temperatures=[0.0, 1.0],
            speed_prompts=0,
        )
    show(result)


def drafting_greedily(drafter: str, folder: Path) -> Path:
    """Return a copy of a drafter folder that drafts the likeliest token at every temperature."""
    shutil.copytree(resolve_folder(drafter), folder)
    about = folder / "drafttrain.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"draft": "greedy"}))
    return folder


if __name__ == "__main__":
    main()
