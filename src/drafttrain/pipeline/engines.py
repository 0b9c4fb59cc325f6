"""The stages behind the drafter folder: further formats, serving engines that prove them, and the command that serves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, GateError, RecipeError
from drafttrain.core.files import write_json, write_text
from drafttrain.pipeline.data import contaminated_prompts
from drafttrain.pipeline.run import quiet_libraries

if TYPE_CHECKING:
    from drafttrain.config.recipe import Recipe
    from drafttrain.eval.settings import EvalSettings
    from drafttrain.export.settings import ExportSettings
    from drafttrain.pipeline.run import Run
    from drafttrain.target_model import Target
    from drafttrain.target_model.settings import TargetSettings

DRAFTER_FORMAT = "hf"
ENGINES = "engine.json"
"""In a drafter folder: what serving engines did with it, beside the evaluator."""


@dataclass(frozen=True)
class Stand:
    """What a drafter is served and judged with."""

    target: TargetSettings
    eval: EvalSettings
    export: ExportSettings
    dropped: Sequence[str] = ()
    """Prompts that the training text spoils."""


def check_engines(settings: ExportSettings, kind: str | None, *, where: Path) -> None:
    """Refuse engines that cannot run the drafter or are not installed, before anything is done for them.

    Args:
        kind: Of the drafter; None: there is none.
        where: What the message is about.

    Raises:
        CheckpointError: Naming the engines that run this kind.
        EngineError: Naming the command that installs one.
    """
    from drafttrain.environments.environment import check_installed
    from drafttrain.export.convert import exporter_of
    from drafttrain.serving.engines import engine_of

    for name in settings.verify:
        if kind is not None:
            engine_of(name).check_kind(where, kind)
        check_installed(engine_of(name).environment)
    for writer in filter(None, (exporter_of(format).environment for format in formats_of(settings))):
        check_installed(writer)


def check_writer(recipe: Recipe, texts: Path) -> None:
    """Refuse a recipe whose texts vLLM is to write where it is not installed, before a target is loaded.

    Args:
        texts: Folder of what is written; once it is whole, nobody writes any more.

    Raises:
        RecipeError: Naming the command that installs it, and who writes texts without it.
    """
    from drafttrain.data_gen.backends.vllm import environment_on
    from drafttrain.environments.environment import is_installed
    from drafttrain.target_model.device import kind_of_device

    generate = recipe.data.generate
    if generate is None or generate.backend.kind != "vllm" or (texts / "manifest.json").exists():
        return
    environment = environment_on(kind_of_device(recipe.target.device))
    if not is_installed(environment):
        problem = (
            f"data.generate.backend: vllm is not installed here: drafttrain engines install {environment.name}; or let drafttrain write the "
            "texts itself, more slowly: 'data.generate.backend={kind: builtin}'"
        )
        raise RecipeError(recipe.name, [problem])


def folder_as(source: Path, name: str) -> Path:
    """Return where a drafter folder goes in a format: beside it."""
    return source.with_name(f"{source.name}.{name}")


def formats_of(settings: ExportSettings) -> list[str]:
    """Return the formats that are written: those asked for, and the first of every engine that reads none of them.

    The drafter folder itself is the format `hf`; an engine that wants no other reads it there.
    """
    from drafttrain.serving.engines import engine_of

    formats = list(dict.fromkeys(settings.to))
    for name in settings.verify:
        readable = engine_of(name).formats
        if not set(readable) & set(formats) and readable[0] != DRAFTER_FORMAT:
            formats.append(readable[0])
    return formats


def _target_config(target: TargetSettings) -> dict[str, Any]:
    from drafttrain.export.convert import read_target_config
    from drafttrain.target_model.folders import resolve_folder

    return read_target_config(resolve_folder(target.model or "", revision=target.revision), name=_told_name(target))


def _told_name(target: TargetSettings) -> str:
    """Return how files name a target to an engine, which knows no builtin one."""
    from drafttrain.target_model.folders import BUILTIN, resolve_folder

    name = target.model or ""
    return str(resolve_folder(name)) if name.startswith(BUILTIN) else name


def write_formats(
    source: Path, settings: ExportSettings, target: TargetSettings, *, out: Path | None = None
) -> dict[str, Path]:
    """Write a drafter folder in every format that is asked for; return the folders by format.

    Args:
        out: Where a single format goes.
    """
    from drafttrain.export.convert import converted, export_as

    target_config = _target_config(target)
    folders = {format: out or folder_as(source, format) for format in formats_of(settings)}
    for format in folders:
        # Nothing is written where one of them cannot be.
        converted(format, source, target_config)
    for format, folder in folders.items():
        export_as(format, source, folder, target_config=target_config)
        say(f"exported: {folder}")
    return folders


def formats_are_current(source: Path, formats: Sequence[str], target: TargetSettings) -> bool:
    """Tell whether every format is there, and is what the drafter folder gives."""
    from drafttrain.export.convert import check_exported

    target_config = _target_config(target)
    try:
        for format in formats:
            check_exported(format, source, folder_as(source, format), target_config=target_config)
    except CheckpointError:
        return False
    return True


def verified(
    source: Path, folders: dict[str, Path], stand: Stand, target: Target | None = None
) -> list[dict[str, Any]]:
    """Let every engine serve the formats that it reads; return the comparisons, and write them into the folders.

    Args:
        source: The drafter folder that the formats were made from, which the evaluator reads.
        target: The target where it is loaded already.
    """
    from drafttrain.target_model import Target

    if not stand.export.verify:
        return []
    target = target or Target.load(stand.target)
    found = [one for name in stand.export.verify for one in _verified_in(name, source, folders, stand, target)]
    for folder in (source, *folders.values()):
        of_folder = [one for one in found if folder == source or folders.get(one["format"]) == folder]
        if of_folder:
            write_json(folder / ENGINES, of_folder)
    return found


def write_engine_card(
    folder: Path, source: Path, comparisons: Sequence[dict[str, Any]], *, format: str = DRAFTER_FORMAT
) -> None:
    """Write the card of a folder in a format: the source's, with what engines did."""
    from drafttrain.serving.card import in_format, with_engines

    card = source / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {source.name}\n"
    if format != DRAFTER_FORMAT:
        text = in_format(text, format)
    write_text(folder / "README.md", with_engines(text, comparisons) if comparisons else text)


def _verified_in(
    name: str, source: Path, folders: dict[str, Path], stand: Stand, target: Target
) -> Iterator[dict[str, Any]]:
    from drafttrain.checkpoint import read_drafter
    from drafttrain.eval.prompts import read_prompts
    from drafttrain.export.convert import check_exported, read_target_config
    from drafttrain.serving.comparison import compare_with_engine, plain_output
    from drafttrain.serving.engines import Job, engine_of
    from drafttrain.serving.problems import SAMPLED_TEMPERATURE

    engine = engine_of(name)
    drafter = read_drafter(source, target)
    engine.check_kind(source, drafter.kind)
    prompts = read_prompts(
        stand.eval.prompts,
        target.tokenizer,
        prompt_tokens=stand.eval.prompt_tokens,
        dropped=stand.dropped,
        limit=stand.export.verify_prompts,
    )
    depth = getattr(stand.eval.length, "depth", getattr(stand.eval.length, "num_draft_tokens", 5))
    num_draft_tokens = min(depth, drafter.deepest or depth)
    new_tokens = stand.export.verify_tokens
    longest = max(len(prompt.tokens) for prompt in prompts) + new_tokens + 2 * num_draft_tokens
    standing = drafter.adapted(target)
    with served_folder(stand.target, standing, target) as target_folder:
        job = Job(
            target=target_folder,
            prompts=[prompt.tokens for prompt in prompts],
            max_new_tokens=new_tokens,
            temperatures=[0.0, SAMPLED_TEMPERATURE],
            dtype=str(target.model.dtype).removeprefix("torch."),
            max_length=longest,
        )
        target_config = read_target_config(target_folder, name=_told_name(stand.target))
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
            yield {"format": format, **comparison.json()}


@contextmanager
def served_folder(settings: TargetSettings, standing: Target, target: Target) -> Iterator[Path]:
    """Yield the folder of the target that a drafter stands on: its own, or one with the adapters merged into it."""
    from drafttrain.target_model.folders import resolve_folder

    if standing is target:
        yield resolve_folder(settings.model or "", revision=settings.revision)
        return
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as temporary:
        standing.model.save_pretrained(temporary)
        standing.tokenizer.save_pretrained(temporary)
        yield Path(temporary)


def only(settings: ExportSettings, formats: Sequence[str], kind: str, *, verify: bool) -> ExportSettings:
    """Return export settings of these formats alone, not proven, or in every engine that reads one and runs this kind.

    Engines that the settings name are the only ones then.

    Raises:
        CheckpointError: A format has no engine to prove it.
    """
    from drafttrain.export.convert import exporter_of
    from drafttrain.serving.engines import engine_of, engines

    for format in formats:
        exporter_of(format)
    able = [name for name in settings.verify or engines.names() if kind in engine_of(name).methods]
    proving = [name for name in able if set(engine_of(name).formats) & set(formats)] if verify else []
    unread = [f for f in formats if verify and not any(f in engine_of(name).formats for name in proving)]
    if unread:
        raise CheckpointError(
            f"--verify: no engine here runs {kind} and reads {', '.join(unread)}. Engines: {', '.join(engines.names())}"
        )
    return replace(settings, to=list(formats), verify=proving)


def write_and_verify(source: Path, stand: Stand, *, out: Path | None) -> None:
    from drafttrain.export.folder import kind_of

    quiet_libraries()
    check_engines(stand.export, kind_of(source), where=source)
    folders = write_formats(source, stand.export, stand.target, out=out)
    comparisons = verified(source, folders, stand)
    for format, folder in folders.items():
        write_engine_card(folder, source, [one for one in comparisons if one["format"] == format], format=format)
    if comparisons:
        write_engine_card(source, source, comparisons)
    failed = [f"{one['engine']} ({one['format']}): {problem}" for one in comparisons for problem in one["problems"]]
    if failed:
        raise GateError(
            "a serving engine does not do what the evaluator does:\n" + "\n".join(f"  {line}" for line in failed)
        )


def in_engines(run: Run, source: Path) -> list[dict[str, Any]]:
    """Write the further formats of a run's drafter and let engines prove them; what was done before is kept."""
    settings, done = run.recipe.export, source / ENGINES
    formats = formats_of(settings)
    if formats and formats_are_current(source, formats, run.recipe.target) and (done.exists() or not settings.verify):
        say("further formats: done before, skipped")
        return json.loads(done.read_text(encoding="utf-8")) if settings.verify else []
    folders = write_formats(source, settings, run.recipe.target)
    dropped = contaminated_prompts(run, run.recipe.eval.prompts)
    stand = Stand(run.recipe.target, run.recipe.eval, settings, dropped)
    whole = run.target if settings.verify and run.placement == "replicated" else None
    return verified(source, folders, stand, whole)
