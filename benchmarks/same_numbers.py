"""Tests whether two checkouts of this project give the same numbers, for a change of the code that must change none.

Each recipe is fitted with `--smoke` and exported in both checkouts, one process after the other, in work folders with the same
relative paths. Then everything except times, speeds and provenance is compared exactly: rows of metrics, records and stored arrays,
tensors, evaluations, printed tables, exported formats and the other JSON files. A file with the same content at another path has moved
and counts as equal. Checkpoints (.ckpt, .pt), recipe.yaml, reports and cards are not read. The outputs of BEFORE are stored in the work
folder under its commit, unless its files are changed. The exit code is 1 if anything differs.

    git worktree add ../before 1e0117c
    python benchmarks/same_numbers.py ../before . --work /tmp/same_numbers
    python benchmarks/same_numbers.py ../before . --work /tmp/same_numbers --control

With `--control` the script must find differences: AFTER is compared with copies of itself. In each copy one value of `tiny_eagle3` is
changed. The exit code is then 1 if a difference is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from same_numbers_files import ABSENT, RENAMED, RENAMED_PATHS, contents, differences, match_moved, short

REAL = ["target.model=builtin:target", "target.dtype=float32", "train.precision=fp32", "export.dtype=float32"]
REAL += ["data.generate.prompts={kind: stdlib}", "data.generate.backend={kind: builtin}", "eval.max_new_tokens=8"]
RECIPES: dict[str, tuple[list[str], str]] = {
    "demo": ([], "vllm sglang gguf"),
    "builtin_drafter": ([], ""),
    "direct_alignment": ([], "vllm sglang gguf"),
    "tiny_medusa": ([], "vllm"),
    "tiny_medusa2": ([], ""),
    "tiny_kangaroo": ([], ""),
    "tiny_eagle": ([], "vllm sglang"),
    "tiny_eagle3": ([], "vllm speculators sglang"),
    "tiny_acceptance": ([], ""),
    "tiny_judge": (["target.model=builtin:adder", "head.drafter=builtin:adder_drafter"], ""),
    "tiny_judge_target": ([], ""),
    "tiny_judge_drafter": ([], ""),
    "online": ([], ""),
    "kd_qwen3_8b_0.6b": ([*REAL, "drafter.checkpoint=builtin:drafter"], "vllm sglang gguf"),
    "kangaroo_llama3.1_8b": (REAL, ""),
    "medusa_llama3.1_8b": (REAL, "vllm"),
    "eagle3_llama3.1_8b": ([*REAL, "drafter.draft_vocab_size=512"], "vllm speculators sglang"),
    "eagle3_1_qwen3_8b": ([*REAL, "drafter.draft_vocab_size=512"], "vllm speculators sglang"),
    "p_eagle_qwen3_8b": ([*REAL, "drafter.draft_vocab_size=512", "drafter.mask_token_id=1"], "vllm speculators"),
    "eagle3_qwen3_8b": ([*REAL, "drafter.draft_vocab_size=512"], "vllm speculators sglang"),
}
"""Overrides of each recipe, and the formats to which its drafter is exported."""
CONTROLS = (("lr: 6e-3", "lr: 6.01e-3", "metrics tensors exports"), ("seed: 0", "seed: 1", "metrics data tensors eval"))
"""In the recipe tiny_eagle3: a value, its replacement, and the kinds of outputs that must then differ."""
KINDS = ("run", "metrics", "data", "tensors", "eval", "tables", "exports", "json")
LOOSE = ("metrics", "eval", "json", "tables")
"""Here a key that only one side has is a note (of metrics: that only AFTER has), and so is a JSON file that only AFTER has."""


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout before the change")
    parser.add_argument("after", type=Path, help="checkout after the change")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--work", type=Path, default=Path("same_numbers"), help="folder of the outputs")
    parser.add_argument("--control", action="store_true", help="compare AFTER with copies that must differ")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.control:
        sys.exit(control(arguments.after, work))
    wrong: set[str] = set()
    for recipe in arguments.recipes:
        before = outputs(arguments.before, recipe, kept(arguments.before, work))
        wrong |= compared(recipe, before, outputs(arguments.after, recipe, work / "after"))
    print(f"DIFFERENT: {', '.join(sorted(wrong))}" if wrong else "all equal")
    sys.exit(bool(wrong))


def control(checkout: Path, work: Path) -> bool:
    """Change one value at a time in a copy of a checkout; return whether a difference was missed."""
    recipe, missed, copy = "tiny_eagle3", False, work / "planted"
    right = outputs(checkout, recipe, kept(checkout, work))
    for old, new, kinds in CONTROLS:
        shutil.rmtree(copy, ignore_errors=True)
        for part in ("src", "recipes"):
            shutil.copytree(checkout / part, copy / part, symlinks=True)
        file = copy / "recipes" / f"{recipe}.yaml"
        text = file.read_text(encoding="utf-8")
        assert f"{old}\n" in text, f"{file} does not contain {old}"
        file.write_text(text.replace(f"{old}\n", f"{new}\n"), encoding="utf-8")
        print(f"planted in {recipe}: {old} -> {new}")
        silent = set(kinds.split()) - compared(recipe, right, outputs(copy, recipe, work / "control"))
        print(f"control {'FAILED, equal in both: ' + ', '.join(sorted(silent)) if silent else 'passed'}")
        missed |= bool(silent)
    return missed


def kept(checkout: Path, work: Path) -> Path:
    """Return the folder for the outputs of a checkout; its name has the commit, unless its files are changed."""
    words = ["rev-parse --short=12 HEAD", "status --porcelain"]
    git = [subprocess.run(["git", *one.split()], cwd=checkout, capture_output=True, text=True).stdout for one in words]
    return work / (f"before-{git[0].strip()}" if git[0] and not git[1] else "before")


def outputs(checkout: Path, recipe: str, side: Path) -> Path:
    """Fit a recipe in a checkout and export its drafter; return the work folder, which may be from an earlier call."""
    folder, log = side / recipe, side / recipe / "log.json"
    overrides, formats = RECIPES[recipe]
    commands = [["fit", recipe, "--smoke", *overrides]]
    for name in formats.split():
        commands.append(["export", f"runs/{recipe}-smoke", "--to", name, "--out", f"exports/{name}"])
    if side.name.startswith("before-") and log.exists():
        earlier = json.loads(log.read_text(encoding="utf-8"))
        if [one["command"] for one in earlier] == commands and not any(one["code"] for one in earlier):
            return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    began, made = time.monotonic(), []
    for command in commands:
        whole = [sys.executable, "-m", "drafttrain", *command]
        done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True)
        error = done.stderr.strip()[-300:] if done.returncode else ""
        made.append({"command": command, "code": done.returncode, "error": error, "stdout": done.stdout})
    log.write_text(json.dumps(made, indent=1), encoding="utf-8")
    print(f"{recipe}: {side.name} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return folder


def compared(recipe: str, before: Path, after: Path) -> set[str]:
    """Print a line per kind of output; return the kinds that differ."""
    sides, wrong = (contents(before, RENAMED, RENAMED_PATHS), contents(after, {}, {})), set()
    for kind in KINDS:
        one, other = ({path: found for (k, path), found in side.items() if k == kind} for side in sides)
        moved = match_moved(one, other)
        notes: list[str] = []  # on one side only, which is not a difference for these kinds
        found: list[str] = []
        for path in sorted({*one, *other}):
            loose = kind in LOOSE and path in other and (path in one or kind == "json")
            for name, a, b in differences(one.get(path, ABSENT), other.get(path, ABSENT), path):
                one_sided = a is ABSENT or (b is ABSENT and kind != "metrics")
                (notes if loose and one_sided else found).append(f"{name}: {short(a)} != {short(b)}")
        if kind == "run":
            found += [f"{path} failed: {short(one[path])}" for path in one if one[path] != "done" and not found]
        wrong |= {kind} if found else set()
        line = f"DIFFERENT ({len(found)}), first {found[0]}" if found else "equal"
        line += f"; moved: {len(moved)}, first {moved[0]}" if moved else ""
        line += f"; note: {len(notes)} on one side only, first {notes[0]}" if notes else ""
        if one or other:
            print(f"{recipe:20} {kind:7} {len(one):3} {line}", flush=True)
    return wrong


if __name__ == "__main__":
    main()
