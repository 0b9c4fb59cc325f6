"""Export a head: config.json, model.safetensors, and drafttrain's own file that names its kind, target and drafter."""

from __future__ import annotations

from pathlib import Path

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import folder_beside
from drafttrain.eval.interval import number
from drafttrain.eval.result import Result
from drafttrain.export.markdown import block, code, plain
from drafttrain.heads.folder import load_head
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import MadeFor


def export_head(trained: Path, folder: Path, *, kind: str, held_out: HeadRows, made_for: MadeFor, dtype: str) -> None:
    """Write the folder of a head from the weights that training saved, and read the files back.

    Args:
        trained: Folder that `TokenHead.save` wrote.
        held_out: Tokens on which a threshold is chosen.
        dtype: Type of the weights in the file.

    Raises:
        CheckpointError: The file read back differs from what was written.
    """
    head = load_head(trained, kind=kind).head
    head.finish(held_out)
    head.to(getattr(torch, dtype))
    with folder_beside(folder) as temporary:
        head.save(temporary, made_for)
        back = load_head(temporary, kind=kind).head.state_dict()
        wrong = [
            name for name, tensor in head.state_dict().items() if not torch.equal(back[name], tensor.to(back[name]))
        ]
        if wrong:
            raise CheckpointError(f"{folder}: {len(wrong)} tensors read back differ from what was written: {wrong[:5]}")


def head_card(name: str, result: Result, *, recipe: str, command: str) -> str:
    """Return README.md of a head's folder.

    Args:
        result: What `evaluate` returned, with `head`.
        recipe: The resolved recipe.
    """
    head, made = result.head, result.provenance
    assert head is not None
    made_for = head.made_for
    assert made_for is not None
    figures = [
        f"| {label} | {part.log_likelihood:.4f} | {part.auc:.3f} | {part.ece:.4f} | {part.brier:.4f} |"
        for label, part in head.held_out.items()
    ]
    rows = [
        f"| {part.temperature:g} | {plain(arm)} | {one.block_efficiency.text()} | {number(one.draft_acceptance_rate)} "
        f"| {number(one.mbsu)} |"
        for part in result.temperatures
        for arm, one in part.drafters.items()
    ]
    nl = "\n"
    return f"""---
tags: [speculative-decoding]
---
# {plain(name)}

A head of kind `{head.kind}` for the target {code(made_for.target)} and the drafter {code(made_for.drafter)}, which
stay unchanged. {head.parameters:,} parameters. Figures on {head.rows:,} held-out draft tokens:

| | log-likelihood | AUC | ECE | Brier |
|---|---|---|---|---|
{nl.join(figures)}

Decoding with it ({result.num_prompts} prompts, 95 % intervals over prompts; the embedded evaluator on these files):

| temperature | | block efficiency | draft acceptance rate | MBSU |
|---|---|---|---|---|
{nl.join(rows)}

## Where it comes from

{code(command)}, commit `{made.commit or "unknown"}`, {made.date}, {made.machine.processor}.

{block(recipe, "yaml")}
"""
