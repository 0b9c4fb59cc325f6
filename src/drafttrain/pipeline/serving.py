"""Serving engines that verify an export: they serve a drafter, and their counts are compared with the evaluator's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_drafter
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, GateError
from drafttrain.core.files import write_json, write_text
from drafttrain.environments.environment import check_installed
from drafttrain.eval.prompts import read_prompts
from drafttrain.eval.settings import EvalSettings
from drafttrain.export.convert import check_exported, exporter_of, read_target_config
from drafttrain.export.folder import kind_of
from drafttrain.export.settings import ExportSettings
from drafttrain.pipeline.data import contaminated_prompts
from drafttrain.pipeline.formats import (
    DRAFTER_FORMAT,
    formats_are_current,
    formats_of,
    name_for_engines,
    write_formats,
)
from drafttrain.pipeline.run import Run, quiet_libraries
from drafttrain.serving.card import in_format, with_engines
from drafttrain.serving.comparison import compare_with_engine, plain_output
from drafttrain.serving.engines import Job, Use, engine_of, engines
from drafttrain.serving.problems import SAMPLED_TEMPERATURE
from drafttrain.serving.speed import measure_speed
from drafttrain.target_model import Target
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.settings import TargetSettings

ENGINES = "engine.json"
"""In a drafter folder: how serving engines compared with the evaluator."""

SPEED_PAIRS = 2
"""Of `--speed`, unless export.speed_pairs is set."""


@dataclass(frozen=True)
class ServedWith:
    """Target and settings that a drafter is served with, in an engine and in the evaluator."""

    target: TargetSettings
    eval: EvalSettings
    export: ExportSettings
    dropped: Sequence[str] = ()
    """Prompts that the training text contaminates."""


def check_engines(settings: ExportSettings, kind: str | None, *, where: Path) -> None:
    """Refuse engines that cannot run the drafter or are not installed, before any work is done.

    Args:
        kind: Kind of the drafter; None if there is no drafter.
        where: Path that the message names.

    Raises:
        CheckpointError: Naming the engines that run this kind.
        EngineError: Naming the command that installs one.
    """
    for name in settings.verify:
        if kind is not None:
            engine_of(name).check_kind(where, kind)
        check_installed(engine_of(name).environment)
    for writer in filter(None, (exporter_of(format).environment for format in formats_of(settings, kind))):
        check_installed(writer)


def verified(
    source: Path, folders: dict[str, Path], served_with: ServedWith, target: Target | None = None
) -> list[dict[str, Any]]:
    """Let every engine serve the formats that it reads; return the comparisons, and write them into the folders.

    Args:
        source: The drafter folder that the formats were made from; the evaluator reads it.
        target: The target, if it is loaded already.
    """
    if not served_with.export.verify:
        return []
    target = target or Target.load(served_with.target)
    found = [
        one for name in served_with.export.verify for one in _verified_in(name, source, folders, served_with, target)
    ]
    for folder in (source, *folders.values()):
        of_folder = [one for one in found if folder == source or folders.get(one["format"]) == folder]
        if of_folder:
            write_json(folder / ENGINES, of_folder)
    return found


def write_engine_card(
    folder: Path, source: Path, comparisons: Sequence[dict[str, Any]], *, format: str = DRAFTER_FORMAT
) -> None:
    """Write the card of a folder in a format: the source's card with the comparisons of engines."""
    card = source / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {source.name}\n"
    if format != DRAFTER_FORMAT:
        text = in_format(text, format)
    write_text(folder / "README.md", with_engines(text, comparisons) if comparisons else text)


def _verified_in(
    name: str, source: Path, folders: dict[str, Path], served_with: ServedWith, target: Target
) -> Iterator[dict[str, Any]]:
    engine = engine_of(name)
    drafter = read_drafter(source, target)
    engine.check_kind(source, drafter.kind)
    prompts = read_prompts(
        served_with.eval.prompts,
        target.tokenizer,
        prompt_tokens=served_with.eval.prompt_tokens,
        dropped=served_with.dropped,
        limit=served_with.export.verify_prompts,
    )
    depth = served_with.eval.length.chain_length
    num_draft_tokens = min(depth, drafter.deepest or depth)
    new_tokens = served_with.export.verify_tokens
    longest = max(len(prompt.tokens) for prompt in prompts) + new_tokens + 2 * num_draft_tokens
    standing = drafter.adapted(target)
    with served_folder(served_with.target, standing, target) as target_folder:
        job = Job(
            target=target_folder,
            prompts=[prompt.tokens for prompt in prompts],
            max_new_tokens=new_tokens,
            temperatures=[0.0, SAMPLED_TEMPERATURE],
            dtype=str(target.model.dtype).removeprefix("torch."),
            max_length=longest,
        )
        target_config = read_target_config(target_folder, name=name_for_engines(served_with.target))
        plain = None
        readable = {format: folder for format, folder in folders.items() if format in engine.formats}
        for format, folder in (readable or {DRAFTER_FORMAT: source}).items():
            check_exported(format, source, folder, target_config=target_config)
            if found := engine.problems(folder, drafter.kind, target_config):
                raise CheckpointError("\n  ".join([f"{name} cannot run {folder}:", *found]))
            say(f"{name}: serving {len(prompts)} prompts with {folder}")
            plain = plain or plain_output(engine, job)
            comparison = compare_with_engine(
                engine,
                folder,
                drafter,
                standing,
                prompts,
                job,
                num_draft_tokens=num_draft_tokens,
                plain=plain,
            )
            say(f"{name} ({format}): {comparison}")
            done = {"format": format, **comparison.json()}
            if pairs := served_with.export.speed_pairs:
                use = Use(str(folder.resolve()), drafter.kind, num_draft_tokens, drafter.draft)
                speed = measure_speed(
                    engine,
                    job,
                    use,
                    drafter,
                    standing,
                    prompts,
                    served_with.eval,
                    outputs=[one.tokens for one in plain],
                    num_pairs=pairs,
                )
                say(f"{name} ({format}): {speed}")
                done["speed"] = speed.json()
            yield done


@contextmanager
def served_folder(settings: TargetSettings, standing: Target, target: Target) -> Iterator[Path]:
    """Yield the folder of the target that an engine loads: the target's own, or one with the drafter's adapters merged in."""
    if standing is target:
        yield resolve_folder(settings.model or "", revision=settings.revision)
        return
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
        standing.model.save_pretrained(temporary)
        standing.tokenizer.save_pretrained(temporary)
        yield Path(temporary)


def with_formats(
    settings: ExportSettings, formats: Sequence[str], kind: str, *, verify: bool, speed: bool = False
) -> ExportSettings:
    """Return export settings for these formats alone; with `verify`, with every engine that reads one and runs this kind.

    If the settings name engines, only those are considered. With `speed`, engines are measured.

    Raises:
        CheckpointError: No engine can verify a format.
    """
    for format in formats:
        exporter_of(format)
    able = [name for name in settings.verify or engines.names() if kind in engine_of(name).methods]
    proving = [name for name in able if set(engine_of(name).formats_for(kind)) & set(formats)] if verify else []
    unread = [f for f in formats if verify and not any(f in engine_of(name).formats_for(kind) for name in proving)]
    if unread:
        raise CheckpointError(
            f"--verify: no engine here runs {kind} and reads {', '.join(unread)}. Engines: {', '.join(engines.names())}"
        )
    pairs = settings.speed_pairs or (SPEED_PAIRS if speed else 0)
    return replace(settings, to=list(formats), verify=proving, speed_pairs=pairs)


def write_and_verify(source: Path, served_with: ServedWith, *, out: Path | None) -> None:
    """Write the formats of the settings, let their engines verify them, and write the cards.

    Raises:
        GateError: An engine differs from the evaluator.
    """
    quiet_libraries()
    check_engines(served_with.export, kind_of(source), where=source)
    folders = write_formats(source, served_with.export, served_with.target, out=out)
    comparisons = verified(source, folders, served_with)
    for format, folder in folders.items():
        write_engine_card(folder, source, [one for one in comparisons if one["format"] == format], format=format)
    if comparisons:
        write_engine_card(source, source, comparisons)
    failed = [f"{one['engine']} ({one['format']}): {problem}" for one in comparisons for problem in one["problems"]]
    if failed:
        raise GateError("a serving engine differs from the evaluator:\n" + "\n".join(f"  {line}" for line in failed))


def verified_in_engines(run: Run, source: Path) -> list[dict[str, Any]]:
    """Write the further formats of a run's drafter and verify them in engines; finished work is skipped."""
    settings, done = run.recipe.export, source / ENGINES
    if not settings.to and not settings.verify:
        return []
    formats = formats_of(settings, kind_of(source))
    if formats and formats_are_current(source, formats, run.recipe.target) and (done.exists() or not settings.verify):
        say("further formats: done before, skipped")
        return json.loads(done.read_text(encoding="utf-8")) if settings.verify else []
    folders = write_formats(source, settings, run.recipe.target)
    dropped = contaminated_prompts(run, run.recipe.eval.prompts)
    served_with = ServedWith(run.recipe.target, run.recipe.eval, settings, dropped)
    whole = run.target if settings.verify and run.placement == "replicated" else None
    return verified(source, folders, served_with, whole)
