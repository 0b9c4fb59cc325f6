"""drafttrain serve-config: the command that serves a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drafttrain.checkpoint import read_about
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.export.convert import exporter_of
from drafttrain.export.folder import kind_of, read_files
from drafttrain.pipeline.folder import exported_in
from drafttrain.pipeline.formats import folder_as
from drafttrain.serving.draft_length import best_length, read_evaluation
from drafttrain.serving.engines import Use, engine_of, engines
from drafttrain.target_model.folders import resolve_folder, stands_for_folder


def serve_command(folder: Path, engine: str, *, target: str | None) -> str:
    """Return the command that serves a drafter, with the best draft length of its evaluation.

    Args:
        target: Name of the target; None: the drafter's own.
    """
    if engine not in engines.names():
        raise RecipeError("arguments", [engines.unknown(engine)])
    folder = exported_in(folder)
    about = read_about(folder)
    target = target or (about.target if about else None)
    if not target:
        raise CheckpointError(f"{folder}: no target is named in it. Give --target MODEL")
    serving, kind = engine_of(engine), kind_of(folder)
    serving.check_kind(folder, kind)
    readable = _readable(folder, serving.formats_for(kind), engine)
    if found := serving.misread(readable, kind):
        raise CheckpointError("\n  ".join([f"{engine} cannot run {readable}:", *found]))
    if stands_for_folder(target) or Path(target).is_dir():
        target = str(serving.target_as(resolve_folder(target)).resolve())
    best = best_length(
        read_evaluation(folder), most=read_files(folder).config.get("num_heads") if kind == "medusa" else None
    )
    say(
        f"{best.num_draft_tokens} draft tokens: block efficiency {best.block_efficiency:.2f}, memory-bound speed-up {best.mbsu:.2f} "
        "(by replay of greedy text, and bytes read)"
    )
    draft = serving.draft(kind, about.draft if about else "sampled")
    return serving.command(target, Use(str(readable.resolve()), kind, best.num_draft_tokens, draft))


def _readable(folder: Path, formats: Sequence[str], engine: str) -> Path:
    """Return the folder of a drafter that an engine reads: the given one, or one beside it in another format.

    Raises:
        CheckpointError: Naming the command that writes one.
    """
    for format in formats:
        for candidate in (folder, folder_as(folder, format)):
            if exporter_of(format).holds(candidate):
                return candidate
    raise CheckpointError(
        f"{folder}: {engine} reads {', '.join(formats)}: drafttrain export {folder} --to {formats[0]}"
    )
