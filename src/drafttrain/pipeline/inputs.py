"""Digests of the files that a run reads, so that a change behind the same path is noticed.

`inputs.json` in the run folder stores them; `eval.json` stores those of the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drafttrain.config.recipe import Recipe
from drafttrain.core.digests import files_digest, text_digest
from drafttrain.core.errors import DrafttrainError
from drafttrain.core.registry import components_of
from drafttrain.data_gen.sources import Versioned, sources
from drafttrain.eval.prompts import Prompts, files_of, name_of, prompt_file
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model.folders import fingerprint_of, resolve_folder
from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.tokenizer import tokenizer_files, tokenizer_folder

TARGET, TOKENIZER, GENERATION = "target.model", "target.tokenizer", "target.model (generation config)"
PROMPTS, VALIDATION, GENERATED_FROM = "eval.prompts", "eval.validation_prompts", "data.generate.prompts"
LABELS, CHECKER, BESIDE = "data.annotate", "eval.checker", "eval.beside"
"""Key prefixes of the files that make labels, that check outputs of an evaluation, and that proposers draft from."""
OF_TARGET = (TARGET, TOKENIZER, GENERATION)
HEAD = "head."
"""Key prefix of the heads that an evaluation reads."""

Inputs = dict[str, dict[str, Any]]
"""By key of the recipe: its path, and the digest of the content; null if unknown."""

Reader = tuple[str, str | None, Callable[[], Any]]
"""A key, its path (None if it has none), and the function that returns the digest."""


def inputs_of(recipe: Recipe, *, only: Callable[[str], bool] = lambda key: True) -> Inputs:
    """Return the inputs of a recipe.

    Args:
        only: Selects keys; files of other keys may be missing.
    """
    return {
        key: {"path": path, "digest": _digest(digest)} for key, path, digest in _readers(recipe) if path and only(key)
    }


def is_evaluated_on(key: str) -> bool:
    """Return whether an evaluation reads this input."""
    return key in (*OF_TARGET, PROMPTS) or key.startswith((HEAD, CHECKER, BESIDE))


def evaluation_inputs(target: TargetSettings, settings: EvalSettings) -> Inputs:
    """Return the inputs of an evaluation without a recipe, except its drafters."""
    readers = [*_of_target(target), *_of_evaluation(settings)]
    return {key: {"path": path, "digest": _digest(digest)} for key, path, digest in readers if path}


def changed(held: Mapping[str, Any], now: Inputs) -> dict[str, str]:
    """Return a description of each input whose content changed behind the same path, by key; unknown digests are not compared."""
    return {
        key: _in_words(held[key]["digest"], one["digest"], path=one["path"])
        for key, one in now.items()
        if key in held
        and held[key]["path"] == one["path"]
        and None not in (held[key]["digest"], one["digest"])
        and held[key]["digest"] != one["digest"]
    }


def merged(held: Mapping[str, Any], now: Inputs) -> Inputs:
    """Return the current inputs, and the stored ones where the current digest is unknown."""
    known = {key: one for key, one in now.items() if one["digest"] is not None or key not in held}
    return {**held, **known}


def _in_words(before: Any, now: Any, *, path: str) -> str:
    """Return the path, with the names of changed files if the digest lists files."""
    if not (isinstance(before, list) and isinstance(now, list)):
        return path
    files = [{str(one[0] if isinstance(one, list) else one): one for one in listed} for listed in (before, now)]
    names = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    apart = [name for name in names if name != Path(path).name]
    return f"{path} ({', '.join(apart[:5])}{', ...' if len(apart) > 5 else ''})" if apart else path


def _digest(digest: Callable[[], Any]) -> Any:
    """Return a digest; None if the file is missing, which the stage that reads it reports."""
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
        yield from (_of_source(key, source) for key, source in recipe.data.generate.prompt_sources().items())
    yield _of_folder("drafter.checkpoint", getattr(recipe.drafter, "checkpoint", None))
    yield _of_tokenizer("drafter.tokenizer", getattr(recipe.drafter, "tokenizer", None))
    yield _of_folder(f"{HEAD}drafter", getattr(recipe.head, "drafter", None))
    yield from _of_files(LABELS, recipe.data.annotate)
    if recipe.train.deepspeed is not None:
        yield _of_file("train.deepspeed.config", recipe.train.deepspeed.config)
    yield from _of_evaluation(recipe.eval)
    yield _of_prompts(VALIDATION, recipe.eval.validation_prompts)


def _of_evaluation(settings: EvalSettings) -> Iterator[Reader]:
    parts = list(components_of(settings))
    heads = [head for part in parts if isinstance(head := getattr(part, "head", None), str)]
    for number, head in enumerate(heads):
        yield _of_folder(f"{HEAD}eval.{number}", head)
    for number, part in enumerate(parts):
        yield _of_file(
            f"{HEAD}eval.calibration.{number} ({getattr(part, 'kind', '')})", getattr(part, "calibration", None)
        )
    yield from _of_files(CHECKER, settings.checker)
    for number, part in enumerate(components_of(settings.beside)):
        yield _of_file(f"{BESIDE}.{number} ({part.kind})", getattr(part, "corpus", None))
    yield _of_prompts(PROMPTS, settings.prompts)


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


def _of_tokenizer(key: str, name: str | None) -> Reader:
    return key, name, lambda: files_digest(tokenizer_files(resolve_folder(str(name))))


def _of_files(key: str, settings: Any) -> Iterator[Reader]:
    """Yield the files that a component and its inner components read: marked answers, unit tests."""
    for part in components_of(settings):
        yield _of_file(f"{key} ({part.kind})", getattr(part, "path", None))


def _of_file(key: str, path: str | None) -> Reader:
    return key, path, lambda: text_digest(Path(str(path)).expanduser())


def _of_prompts(key: str, prompts: Prompts) -> Reader:
    def digest() -> Any:
        found = [[file.path, text_digest(prompt_file(file.path))] for file in files_of(prompts)]
        return found[0][1] if isinstance(prompts, str) else found

    return key, name_of(prompts), digest
