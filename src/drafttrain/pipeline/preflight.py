"""Whether target, drafter, data and export of a recipe fit together, before anything expensive: from configurations and tokenizers alone.

It takes seconds, loads no weights, and reports all problems at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drafttrain.config.made_by import MADE_BY
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DataError, RecipeError
from drafttrain.core.foreign import check_folder, read_json
from drafttrain.data_gen.sources import Versioned, sources
from drafttrain.eval.prompts import prompt_file
from drafttrain.export import exporters
from drafttrain.export.layout import text_config
from drafttrain.target_model.end_tokens import end_of_text_id
from drafttrain.target_model.folder_checks import check_causal_lm, check_model_files, in_one_line
from drafttrain.target_model.folders import cached_folder, resolve_folder
from drafttrain.target_model.positions import position_limit
from drafttrain.target_model.tokenizer import check_same_tokenizer, load_tokenizer, num_ids

FIRST_SHOWN = 3


class NotHere(Exception):
    """A model that is not on this machine yet: a name of the hub, or what another recipe makes."""


class Parts:
    """A model by its name: folder, configuration, tokenizer, each read when it is asked for.

    Args:
        key: Of the recipe.
        fetch: Take it from the hub where it is not here.
    """

    def __init__(
        self,
        key: str,
        name: str,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        fetch: bool = True,
    ) -> None:
        self.key = key
        self.name = name
        self._revision = revision
        self._tokenizer = tokenizer
        self._trust = trust_remote_code
        self._fetch = fetch

    @cached_property
    def folder(self) -> Path:
        """Its folder."""
        return self._folder_of(self.name, self._revision)

    @cached_property
    def config(self) -> Any:
        """Configuration of the language model, under the names that transformers has for all of them.

        Raises:
            CheckpointError: transformers cannot read it.
        """

        try:
            config: Any = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=self._trust)
        except Exception as error:  # what fields of a configuration lead its class to
            raise CheckpointError(f"{self.folder}/config.json: {in_one_line(error)}") from error
        return config.get_text_config()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.tokenizer_folder, trust_remote_code=self._trust)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of its tokenizer."""
        return self._folder_of(self._tokenizer, None) if self._tokenizer else self.folder

    @cached_property
    def num_ids(self) -> int:
        """Ids of its tokenizer."""
        return num_ids(self.tokenizer)

    @property
    def num_rows(self) -> int:
        """Rows of its embedding."""
        return int(self.config.vocab_size)

    @property
    def learnt_positions(self) -> int | None:
        """How many positions it has learnt embeddings for; None where they are computed, or it is none that could be built."""

        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self._trust)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError):  # the stage that loads it says why
            return None
        return position_limit(model)

    def check_causal_lm(self) -> None:
        """Refuse what is no causal LM.

        Raises:
            CheckpointError: Saying what it is.
        """
        check_causal_lm(self.folder, trust_remote_code=self._trust)

    def _folder_of(self, name: str, revision: str | None) -> Path:
        if name.startswith(MADE_BY):
            raise NotHere(name)
        if self._fetch:
            return resolve_folder(name, revision=revision)
        folder = cached_folder(name, revision=revision)
        if folder is None:
            raise NotHere(name)
        return folder


def check_parts(recipe: Recipe, *, fetch: bool = True, data: bool = True) -> None:
    """Refuse parts of a recipe that do not fit together; what is worth one line is reported.

    Args:
        fetch: Take models from the hub where they are not here; else those are not looked at.
        data: Files of text must be here.

    Raises:
        RecipeError: With every problem.
    """
    problems = list(problems_of(recipe, fetch=fetch, data=data))
    if problems:
        raise RecipeError(recipe.name, problems)


def problems_of(recipe: Recipe, *, fetch: bool = True, data: bool = True) -> Iterator[str]:
    """Yield what of a recipe's parts does not fit together."""
    if recipe.target.model is not None:
        target = target_parts(recipe.target, fetch=fetch)
        yield from _asked(target.key, lambda: _of_target(target, recipe))
    elif recipe.target.tokenizer is not None:
        target = Parts("target.tokenizer", recipe.target.tokenizer, fetch=fetch)
        yield from _asked(target.key, lambda: _reads_tokenizer(target))
    if (checkpoint := getattr(recipe.drafter, "checkpoint", None)) is not None:
        drafter = Parts("drafter.checkpoint", checkpoint, fetch=fetch)
        yield from _asked(drafter.key, lambda: _of_start(drafter, target, recipe))
    if recipe.head is not None:
        drafter = Parts("head.drafter", recipe.head.drafter, fetch=fetch)
        yield from _asked(drafter.key, lambda: _same_tokenizer(drafter, target))
    if data:
        yield from _of_texts(recipe)


def check_drafters(target: Any, drafters: Sequence[str], *, source: str = "arguments") -> None:
    """Refuse drafters that cannot be evaluated with a target.

    Args:
        target: Settings of the target.

    Raises:
        RecipeError: With every problem.
    """
    parts = target_parts(target)
    problems = list(_asked(parts.key, lambda: _rows(parts)))
    for name in drafters:
        drafter = Parts(name, name)
        problems += _asked(name, partial(_same_tokenizer, drafter, parts))
    if problems:
        raise RecipeError(source, problems)


def target_parts(settings: Any, *, fetch: bool = True) -> Parts:
    """Return the parts of a target."""
    return Parts(
        "target.model",
        settings.model,
        revision=settings.revision,
        tokenizer=settings.tokenizer,
        trust_remote_code=settings.trust_remote_code,
        fetch=fetch,
    )


def rows_problem(num_rows: int, tokenizer: Any) -> str | None:
    """Return why a model of so many rows cannot read what a tokenizer writes.

    Special tokens behind the rows, such as one for padding that was added, need not come up in any text.
    """
    behind = {token: id for token, id in tokenizer.get_vocab().items() if id >= num_rows}
    ordinary = {token: id for token, id in behind.items() if token not in _added(tokenizer)}
    if not ordinary:
        return None
    shown = ", ".join(
        f"{token!r} ({id})" for token, id in sorted(ordinary.items(), key=lambda one: one[1])[:FIRST_SHOWN]
    )
    return (
        f"has {num_rows} rows, and its tokenizer ids up to {max(behind.values())}: {len(ordinary)} tokens have no row, as {shown}: "
        "give the tokenizer that it was trained with"
    )


def _added(tokenizer: Any) -> set[str]:
    return {*tokenizer.all_special_tokens, *map(str, getattr(tokenizer, "added_tokens_encoder", {}))}


def _asked(key: str, questions: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield the answers under a key; of what is not here yet none, and of what cannot be read why."""
    try:
        yield from (f"{key}: {problem}" for problem in questions())
    except NotHere as model:
        if not str(model).startswith(MADE_BY):
            say(f"{key}: {model} is not on this machine: not looked at")
    except CheckpointError as error:
        yield f"{key}: {error}"
    except OSError as error:
        yield f"{key}: {str(error.filename or '')[:200]}: {error.strerror or error}"


def _of_target(target: Parts, recipe: Recipe) -> Iterator[str]:
    target.check_causal_lm()
    yield from _rows(target)
    yield from _sizes(target, recipe)
    yield from _positions(target, recipe)
    yield from _formats(target, recipe)
    if note := _window(target.config, recipe):
        say(f"{target.key}: {note}")


def _reads_tokenizer(parts: Parts) -> Iterator[str]:
    if not parts.num_ids:
        yield f"{parts.name}: its tokenizer has no token"


def _rows(target: Parts) -> Iterator[str]:
    if problem := rows_problem(target.num_rows, target.tokenizer):
        yield f"{target.name} {problem}"
    elif target.num_ids > target.num_rows:
        names = sorted(token for token, id in target.tokenizer.get_vocab().items() if id >= target.num_rows)
        say(
            f"{target.key}: {target.name} has {target.num_rows} rows and none for {', '.join(names[:FIRST_SHOWN])}: "
            "a text must not hold them"
        )


def _sizes(target: Parts, recipe: Recipe) -> Iterator[str]:
    """Yield the settings of a drafter that are beyond its target."""
    settings = recipe.drafter
    size = getattr(settings, "draft_vocab_size", None)
    if size is not None and size > target.num_ids and size != target.num_rows:
        yield f"drafter.draft_vocab_size must be 1..{target.num_ids} for {target.name}, got {size}"
    layers = getattr(target.config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    if getattr(settings, "init", None) == "target" and settings.num_layers > layers:
        yield f"drafter.num_layers must be 1..{layers} for {target.name}, got {settings.num_layers}"
    exit_layer = getattr(settings, "exit_layer", None)
    if exit_layer is not None and not 1 <= exit_layer < layers:
        yield f"drafter.exit_layer must be 1..{layers - 1} for {target.name} ({layers} layers), got {exit_layer}"
    taps = getattr(settings, "taps", None)
    if taps and max(taps) >= layers:
        yield f"drafter.taps must be 0..{layers - 1} for {target.name} ({layers} layers), got {taps}"


def _positions(target: Parts, recipe: Recipe) -> Iterator[str]:
    """Yield texts that are longer than a target with learnt positions can read; of other targets they are reported."""
    named = getattr(target.config, "max_position_embeddings", None)
    lengths = {"data.max_length": recipe.data.max_length, "eval.max_new_tokens": recipe.eval.max_new_tokens + 1}
    longer = {key: length for key, length in lengths.items() if isinstance(named, int) and length > named}
    if not longer:
        return
    limit = target.learnt_positions
    for key, length in longer.items():
        if limit is not None:
            yield f"{key}: {length} tokens are more than the {limit} positions of {target.name}"
        else:
            say(f"{key}: {length} tokens are more than the {named} positions that {target.name} was made for")


def _formats(target: Parts, recipe: Recipe) -> Iterator[str]:
    """Yield why a format of the export has no place for a drafter of this target."""
    for name in recipe.export.to:
        found = (
            exporters.entry(name)
            .component()
            .target_problems(target.tokenizer_folder, num_rows=target.num_rows, end=end_of_text_id(target.tokenizer))
        )
        yield from (f"export.to: {name}: {target.name}: {problem}" for problem in found)


def _window(config: Any, recipe: Recipe) -> str | None:
    """Return what a sliding window of the target costs."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if isinstance(kinds, list) else getattr(config, "use_sliding_window", True)
    longest = recipe.data.max_length
    if not isinstance(window, int) or not slides or window > longest:
        return None
    return f"a sliding window of {window}, data.max_length is {longest}: texts that reach it are decoded one at a time"


def _of_start(drafter: Parts, target: Parts, recipe: Recipe) -> Iterator[str]:
    """Yield why a drafter cannot be trained on from a folder."""
    if recipe.drafter.kind == "causal_lm":
        drafter.check_causal_lm()
    else:
        check_folder(drafter.folder)
        path = drafter.folder / "drafttrain.json"
        if not path.is_file():
            yield f"{drafter.name}: no drafttrain.json here: not a drafter folder. One that others made: drafttrain import FOLDER"
            return
        if (kind := read_json(path).get("kind")) != recipe.drafter.kind:
            yield f"{drafter.name} is of kind {kind}, drafter.kind is {recipe.drafter.kind}"
            return
    yield from _same_tokenizer(drafter, target)


def _same_tokenizer(drafter: Parts, target: Parts) -> Iterator[str]:
    check_model_files(drafter.folder)
    check_same_tokenizer(target.tokenizer, drafter.tokenizer, drafter=drafter.name)
    rows = text_config(read_json(drafter.folder / "config.json")).get("vocab_size")
    ids = target.num_ids if target.key == "target.tokenizer" else min(target.num_ids, target.num_rows)
    if isinstance(rows, int) and rows < ids:
        yield f"{drafter.name} has {rows} rows, the target's tokenizer {ids} tokens: the last ones have no row"


def _of_texts(recipe: Recipe) -> Iterator[str]:
    """Yield the files of text that are not here."""
    places = {f"data.sources.{number}": source for number, source in enumerate(recipe.data.sources)}
    if recipe.data.generate is not None:
        places["data.generate.prompts"] = recipe.data.generate.prompts
    for key, settings in places.items():
        if settings.kind in ("hub", "serving_logs") or getattr(settings, "path", None) is None:
            continue
        try:
            source = sources.build(settings)
            if isinstance(source, Versioned):
                source.version()
        except (DataError, OSError) as error:
            yield f"{key}: {error}"
    for key in ("prompts", "validation_prompts"):
        try:
            prompt_file(getattr(recipe.eval, key))
        except DataError as error:
            yield f"eval.{key}: {error}"
