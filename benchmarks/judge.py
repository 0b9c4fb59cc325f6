"""Measures a judge's threshold on draft tokens that it was not chosen on: those of the test prompts, labelled as in training.

    drafttrain fit tiny_judge
    python benchmarks/judge.py runs/tiny_judge

Prints AUC and ECE, how many of the tokens that matter the threshold rejects, and the share of the others that it accepts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from drafttrain.checkpoint import read_drafter
from drafttrain.config.load import load_recipe
from drafttrain.core.calibration import auc, ece
from drafttrain.core.console import table
from drafttrain.core.texts import Record
from drafttrain.data_gen.annotate import Frozen, annotators
from drafttrain.data_gen.stored.labelled_tokens import LabelledTokens
from drafttrain.eval.prompts import read_prompts
from drafttrain.heads.folder import load_head
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import probabilities
from drafttrain.target_model import Target
from drafttrain.target_model.folders import resolve_folder


def figures(head: Any, rows: HeadRows) -> list[str]:
    """Return one line of the table."""
    predicted_N = probabilities(head, rows)
    accepted_N, matter_N = predicted_N > head.delta, rows.labels_N < 0.5
    return [
        f"{len(rows):,}",
        f"{float(matter_N.float().mean()):.1%}",
        f"{auc(predicted_N, rows.labels_N):.4f}",
        f"{ece(predicted_N, rows.labels_N):.4f}",
        f"{int((~accepted_N[matter_N]).sum())} of {int(matter_N.sum())}",
        f"{float(accepted_N[~matter_N].float().mean()):.1%}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", default="builtin:addition_test")
    chosen = parser.parse_args()
    recipe = load_recipe(chosen.run)
    target = Target.load(recipe.target)
    drafter = read_drafter(resolve_folder(recipe.head.drafter), target).eval().requires_grad_(False)
    head: Any = load_head(chosen.run / "head", kind="judge").head
    annotator = annotators.build(recipe.data.annotate, Frozen(target, drafter, recipe.seed, layer=recipe.head.layer))
    prompts = read_prompts(chosen.prompts, target.tokenizer, prompt_tokens=None)
    # An annotator takes the tokens before the first trained one as the prompt.
    records = [Record(one.id, [*one.tokens, 0], [False] * len(one.tokens) + [True]) for one in prompts]
    fresh = annotator.label(records)
    rows = HeadRows(*(torch.cat([getattr(one, name) for one in fresh]) for name in ("features_ND", "labels_N")))
    held_out = LabelledTokens(chosen.run / "data" / "labelled").held_out
    columns = ["draft tokens of", "tokens", "matter", "AUC", "ECE", "that matter: rejected", "others: accepted"]
    lines = [["held-out texts", *figures(head, held_out)], [chosen.prompts, *figures(head, rows)]]
    table(lines, columns=columns, title=f"threshold {float(head.delta):.4f}")
