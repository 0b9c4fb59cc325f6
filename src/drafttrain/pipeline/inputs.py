"""What a run reads from paths of its recipe, by digest: a path whose content changed is another input under the same name.

Digests are kept in `inputs.json` of the run folder, and those that an evaluation read in its `eval.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drafttrain.config.recipe import Recipe, components_of
from drafttrain.core.digests import files_digest, text_digest
from drafttrain.core.errors import DrafttrainError
from drafttrain.data_gen.sources import Versioned, sources
from drafttrain.eval.prompts import prompt_file
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.tokenizer import tokenizer_files, tokenizer_folder

TARGET, TOKENIZER, GENERATION = "target.model", "target.tokenizer", "target.model (generation config)"
PROMPTS, VALIDATION, GENERATED_FROM = "eval.prompts", "eval.validation_prompts", "data.generate.prompts"
LABELS, CHECKER = "data.annotate", "eval.checker"
"""How the settings of files begin that labels are made by, and that outputs of an evaluation are judged by."""
OF_TARGET = (TARGET, TOKENIZER, GENERATION)
HEAD = "head."
"""How the settings of heads that an evaluation reads begin."""

Inputs = dict[str, dict[str, Any]]
"""By key of the recipe: the path that it gives, and the content's digest; null: not known."""

Reader = tuple[str, str | None, Callable[[], Any]]
"""A key, its path (None: it gives none), and what reads the digest."""


def inputs_of(recipe: Recipe, *, only: Callable[[str], bool] = lambda key: True) -> Inputs:
    """Return what a recipe reads.

    Args:
        only: Whether a key is wanted: what is not read need not be there.
    """
    return {
        key: {"path": path, "digest": _digest(digest)} for key, path, digest in _readers(recipe) if path and only(key)
    }


def is_evaluated_on(key: str) -> bool:
    """Return whether an evaluation reads the input."""
    return key in (*OF_TARGET, PROMPTS) or key.startswith((HEAD, CHECKER))


def target_inputs(settings: TargetSettings, prompts: str) -> Inputs:
    """Return what an evaluation without a recipe reads besides its drafters."""
    readers = [*_of_target(settings), _of_prompts(PROMPTS, prompts)]
    return {key: {"path": path, "digest": _digest(digest)} for key, path, digest in readers if path}


def changed(held: Mapping[str, Any], now: Inputs) -> dict[str, str]:
    """Return by key, in words, what has another content than before under the same path; unknown ones are not compared."""
    return {
        key: _in_words(held[key]["digest"], one["digest"], path=one["path"])
        for key, one in now.items()
        if key in held
        and held[key]["path"] == one["path"]
        and None not in (held[key]["digest"], one["digest"])
        and held[key]["digest"] != one["digest"]
    }


def merged(held: Mapping[str, Any], now: Inputs) -> Inputs:
    """Return the inputs of now, and those of before where now does not know them."""
    known = {key: one for key, one in now.items() if one["digest"] is not None or key not in held}
    return {**held, **known}


def _in_words(before: Any, now: Any, *, path: str) -> str:
    """Return the names of files that changed, where a digest lists files."""
    if not (isinstance(before, list) and isinstance(now, list)):
        return path
    files = [{str(one[0] if isinstance(one, list) else one): one for one in listed} for listed in (before, now)]
    names = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    apart = [name for name in names if name != Path(path).name]
    return f"{path} ({', '.join(apart[:5])}{', ...' if len(apart) > 5 else ''})" if apart else path


def _digest(digest: Callable[[], Any]) -> Any:
    """Return a digest; None of what is not there: the stage that reads it reports that in its own words."""
    try:
        return digest()
    except (DrafttrainError, OSError):
        return None


def _readers(recipe: Recipe) -> Iterator[Reader]:
    yield from _of_target(recipe.target)
    if recipe.online is None:
        for number, source in enumerate(recipe.data.sources):
            yield _of_source(f"data.sources.{number}", source)
    if recipe.data.generate is not None:
        yield _of_source(GENERATED_FROM, recipe.data.generate.prompts)
    yield _of_folder("drafter.checkpoint", getattr(recipe.drafter, "checkpoint", None))
    yield _of_folder(f"{HEAD}drafter", getattr(recipe.head, "drafter", None))
    for number, head in enumerate(_heads(recipe.eval)):
        yield _of_folder(f"{HEAD}eval.{number}", head)
    yield from _of_files(LABELS, recipe.data.annotate)
    yield from _of_files(CHECKER, recipe.eval.checker)
    if recipe.train.deepspeed is not None:
        yield _of_file("train.deepspeed.config", recipe.train.deepspeed.config)
    yield _of_prompts(PROMPTS, recipe.eval.prompts)
    yield _of_prompts(VALIDATION, recipe.eval.validation_prompts)


def _of_target(settings: TargetSettings) -> Iterator[Reader]:
    def folder() -> Path:
        return resolve_folder(str(settings.model), revision=settings.revision)

    yield TARGET, settings.model, lambda: fingerprint_of(folder())
    yield GENERATION, settings.model, lambda: files_digest(folder().glob("generation_config.json"))
    yield (
        TOKENIZER,
        settings.tokenizer or settings.model,
        lambda: files_digest(tokenizer_files(tokenizer_folder(settings))),
    )


def _of_source(key: str, settings: Any) -> Reader:
    def digest() -> Any:
        source = sources.build(settings)
        return source.version() if isinstance(source, Versioned) else None

    return key, getattr(settings, "path", None), digest


def _of_folder(key: str, name: str | None) -> Reader:
    return key, name, lambda: fingerprint_of(resolve_folder(str(name)))


def _of_files(key: str, settings: Any) -> Iterator[Reader]:
    """Yield the files that a component and those inside it read: marked answers, unit tests."""
    for part in components_of(settings):
        yield _of_file(f"{key} ({part.kind})", getattr(part, "path", None))


def _of_file(key: str, path: str | None) -> Reader:
    return key, path, lambda: text_digest(Path(str(path)).expanduser())


def _of_prompts(key: str, name: str) -> Reader:
    return key, name, lambda: text_digest(prompt_file(name))


def _heads(settings: Any) -> Iterator[str]:
    for part in components_of(settings):
        if isinstance(head := getattr(part, "head", None), str):
            yield head
