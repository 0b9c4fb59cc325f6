"""A drafter of a run as a folder that is exported: its start, or trained weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from drafttrain.core.files import folder_beside, write_json

if TYPE_CHECKING:
    from drafttrain.drafters import Drafter
    from drafttrain.pipeline.run import Run


def write_drafter(run: Run, drafter: Drafter, folder: Path, *, steps: int) -> None:
    """Write a drafter in memory as an exported folder."""
    if folder.exists():
        return
    weights = folder.with_name(f".{folder.name}.weights.part")
    with folder_beside(weights) as temporary:
        drafter.save(temporary)
    calibrate(run, drafter, weights)
    export_weights(run, weights, folder, steps=steps)
    shutil.rmtree(weights)


def calibrate(run: Run, drafter: Drafter, folder: Path) -> None:
    """Write what the drafter fits on the validation texts into the folder of its weights."""
    from drafttrain.core.texts import Record
    from drafttrain.data_gen.groups import groups
    from drafttrain.data_gen.packing import pack
    from drafttrain.drafters import Drafter

    if type(drafter).calibrate is Drafter.calibrate:
        return
    texts, _ = run.validation_texts
    batches = []
    for group in groups([len(text.prompt) + len(text.new) for text in texts]):
        records = [
            Record(text.id, [*text.prompt, *text.new], [False] * len(text.prompt) + [True] * len(text.new))
            for text in (texts[i] for i in group)
        ]
        batch, _ = pack(records, width=max(len(record.tokens) for record in records), weight_of_step=1.0)
        batches.append(batch.to(run.target.device))
    own = next(drafter.parameters()).device
    target = drafter.adapted(run.cached_target)
    for name, content in drafter.to(run.target.device).calibrate(target, batches).items():
        write_json(folder / name, content)
    drafter.to(own)


def export_weights(run: Run, weights: Path, folder: Path, *, steps: int) -> None:
    from drafttrain.checkpoint import About
    from drafttrain.export.hf import export_hf
    from drafttrain.target_model.tokenizer import num_ids, tokenizer_fingerprint

    recipe = run.recipe
    about = About(
        kind=recipe.drafter.kind,
        target=recipe.target.model or "",
        target_fingerprint=run.target.fingerprint if run.has_target() else "",
        tokenizer_fingerprint=tokenizer_fingerprint(run.tokenizer),
        vocab_size=num_ids(run.tokenizer),
        trained_steps=steps,
        draft=recipe.drafter.draft,
    )
    export_hf(weights, folder, tokenizer=run.tokenizer, about=about, dtype=recipe.export.dtype)
