"""Checks that target, drafter, data and export of a recipe fit together, before any expensive work.

They read configurations and tokenizers but no weights, take seconds, and report all problems at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import read_about
from drafttrain.config.made_by import MADE_BY
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DataError, RecipeError
from drafttrain.core.foreign import check_folder, read_json
from drafttrain.core.registry import components_of
from drafttrain.data_gen.sources import Versioned, sources
from drafttrain.data_gen.sources.generated import Generated
from drafttrain.drafters.causal_lm.layer_parallel import class_problem, layer_problem
from drafttrain.drafters.causal_lm.module import CausalLMSettings
from drafttrain.drafters.draft_vocabulary import padding_problems
from drafttrain.drafters.matformer.module import MatFormerSettings
from drafttrain.drafters.sorted_lm.module import SortedLMSettings, exit_problems
from drafttrain.eval.prompts import BUILTIN, Prompts, files_of, prompt_file, read_prompts
from drafttrain.eval.retrieval.bm25 import NOT_INSTALLED
from drafttrain.export import exporters
from drafttrain.export.layout import text_config
from drafttrain.pipeline.model_parts import ModelParts, NotHere, target_parts
from drafttrain.target_model.end_tokens import end_of_text_id
from drafttrain.target_model.first_neurons import share_problem
from drafttrain.target_model.folder_checks import check_model_files
from drafttrain.target_model.folders import fingerprint_of
from drafttrain.target_model.other_tokenizer import OtherTokenizer
from drafttrain.target_model.rolling_back import window_of
from drafttrain.target_model.tokenizer import check_same_tokenizer, tokenizer_files, tokenizer_fingerprint

FIRST_SHOWN = 3
OWN_TOKENIZER, TARGET_TOKENIZER = "drafter.tokenizer", "target.tokenizer"
"""Keys that name a tokenizer without a model."""
PROMPTS = ("prompts", "validation_prompts")
"""Keys of `eval` that name prompts."""
PYTHON_TEXT = ("builtin:test", "builtin:validation")
"""Built-in prompts of source code."""


def check_parts(recipe: Recipe, *, fetch: bool = True, data: bool = True) -> None:
    """Refuse parts of a recipe that do not fit together; print a note on what is allowed but has a cost.

    Args:
        fetch: Download models that are not on this machine; otherwise these are not checked.
        data: Text files must exist.

    Raises:
        RecipeError: With every problem.
    """
    problems = list(problems_of(recipe, fetch=fetch, data=data))
    if problems:
        raise RecipeError(recipe.name, problems)


def problems_of(recipe: Recipe, *, fetch: bool = True, data: bool = True) -> Iterator[str]:
    """Yield every problem between the parts of a recipe."""
    if recipe.target.model is not None:
        target = target_parts(recipe.target, fetch=fetch)
        yield from _problems_under(target.key, lambda: _of_target(target, recipe))
    elif recipe.target.tokenizer is not None:
        target = ModelParts(TARGET_TOKENIZER, recipe.target.tokenizer, fetch=fetch)
        yield from _problems_under(target.key, lambda: _reads_tokenizer(target))
    reads = target
    if (own := getattr(recipe.drafter, "tokenizer", None)) is not None:
        reads = ModelParts(OWN_TOKENIZER, own, fetch=fetch)
        yield from _problems_under(reads.key, lambda: _shares(reads, target))
    if (checkpoint := getattr(recipe.drafter, "checkpoint", None)) is not None:
        drafter = ModelParts("drafter.checkpoint", checkpoint, fetch=fetch)
        yield from _problems_under(drafter.key, lambda: _of_start(drafter, reads, recipe))
    if recipe.head is not None:
        drafter = ModelParts("head.drafter", recipe.head.drafter, fetch=fetch)
        yield from _problems_under(drafter.key, lambda: _same_tokenizer(drafter, target))
    yield from _of_retrievers(recipe, fetch=fetch)
    if data:
        yield from _of_texts(recipe)


def check_drafters(target: Any, drafters: Sequence[str], *, source: str = "arguments") -> None:
    """Refuse drafters that cannot be evaluated with a target.

    Raises:
        RecipeError: With every problem.
    """
    parts = target_parts(target)
    problems = list(_problems_under(parts.key, lambda: _rows(parts)))
    for name in drafters:
        drafter = ModelParts(name, name)
        problems += _problems_under(name, partial(_reads_for, drafter, parts))
    if problems:
        raise RecipeError(source, problems)


def rows_problem(num_rows: int, tokenizer: Any) -> str | None:
    """Return why a model with this number of embedding rows cannot read the ids of a tokenizer; None if it can.

    Special tokens beyond the rows, such as an added padding token, need not occur in any text.
    """
    behind = {token: id for token, id in tokenizer.get_vocab().items() if id >= num_rows}
    ordinary = {token: id for token, id in behind.items() if token not in _added(tokenizer)}
    if not ordinary:
        return None
    shown = ", ".join(
        f"{token!r} ({id})" for token, id in sorted(ordinary.items(), key=lambda one: one[1])[:FIRST_SHOWN]
    )
    return (
        f"has {num_rows} embedding rows, but its tokenizer has ids up to {max(behind.values())}: {len(ordinary)} tokens have no row, "
        f"such as {shown}. Name the tokenizer that the model was trained with"
    )


def _added(tokenizer: Any) -> set[str]:
    return {*tokenizer.all_special_tokens, *map(str, getattr(tokenizer, "added_tokens_encoder", {}))}


def _problems_under(key: str, problems: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield the problems of a model under its key, or why it cannot be read; nothing for a model that is not here yet."""
    try:
        yield from (f"{key}: {problem}" for problem in problems())
    except NotHere as model:
        if not str(model).startswith(MADE_BY):
            say(f"{key}: {model} is not on this machine, so it is not checked")
    except (CheckpointError, DataError) as error:
        yield f"{key}: {error}"
    except OSError as error:
        yield f"{key}: {str(error.filename or '')[:200]}: {error.strerror or error}"


def _of_target(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    target.check_causal_lm()
    yield from _rows(target)
    yield from _sizes(target, recipe)
    yield from _positions(target, recipe)
    if isinstance(recipe.drafter, CausalLMSettings) and recipe.drafter.init == "target":
        yield from _layers_in_parallel(target, recipe, num_layers=recipe.drafter.num_layers)
    yield from _slices(target, recipe.eval.beside)
    yield from _formats(target, recipe)
    yield from _questions(target, recipe)
    yield from _chats(target, recipe)
    yield from _writers(target, recipe)
    for note in (_window(target, recipe), _prompts_of_another_kind(target, recipe)):
        if note:
            say(f"{target.key}: {note}")


def _slices(target: ModelParts, proposers: Sequence[Any]) -> Iterator[str]:
    """Yield the slices of the target that are not a whole number of neurons."""
    width = getattr(target.config, "intermediate_size", None)
    for one in proposers:
        if (
            getattr(one, "kind", "") == "ffn_slice"
            and isinstance(width, int)
            and (why := share_problem(one.share, width))
        ):
            yield f"eval.beside: ffn_slice: {why}"


def _reads_tokenizer(parts: ModelParts) -> Iterator[str]:
    if not parts.num_ids:
        yield f"{parts.name}: its tokenizer has no tokens"


def _rows(target: ModelParts) -> Iterator[str]:
    if problem := rows_problem(target.num_rows, target.tokenizer):
        yield f"{target.name} {problem}"
    elif target.num_ids > target.num_rows:
        names = sorted(token for token, id in target.tokenizer.get_vocab().items() if id >= target.num_rows)
        say(
            f"{target.key}: {target.name} has {target.num_rows} embedding rows and none for "
            f"{', '.join(names[:FIRST_SHOWN])}: texts must not contain them"
        )


def _sizes(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield the settings of a drafter that exceed its target."""
    settings = recipe.drafter
    size = getattr(settings, "draft_vocab_size", None)
    if size is not None and size > target.num_ids and size != target.num_rows:
        yield f"drafter.draft_vocab_size must be 1..{target.num_ids} for {target.name}, got {size}"
    can_draft = min(size or target.num_ids, target.num_ids)
    for key, length in recipe.eval.lengths():
        if length.most_children > can_draft:
            yield f"{key}: {length.kind} has up to {length.most_children} children of a node, and the drafter drafts {can_draft} tokens"
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


def _positions(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield text lengths beyond the learned positions of a target; print a note for other targets."""
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


def _formats(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield why a format of the export cannot hold a drafter of this target."""
    for name in recipe.export.to:
        found = (
            exporters.entry(name)
            .component()
            .target_problems(target.tokenizer_folder, num_rows=target.num_rows, end=end_of_text_id(target.tokenizer))
        )
        yield from (f"export.to: {name}: {target.name}: {problem}" for problem in found)


def _questions(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield the sources of prompts that need a chat template, if the target has none."""
    if recipe.data.generate is None or target.tokenizer.chat_template:
        return
    for key, source in recipe.data.generate.prompt_sources().items():
        if source.kind == "magpie" and source.path is None:
            yield f"{target.name} has no chat template, so it cannot write the questions of {key} (magpie)"


def _chats(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield the prompts of the evaluation that need a chat template, if the target has none."""
    if target.tokenizer.chat_template:
        return
    for key in PROMPTS:
        prompts = getattr(recipe.eval, key)
        try:
            if not any(_missing(prompts)):
                read_prompts(prompts, target.tokenizer, prompt_tokens=recipe.eval.prompt_tokens, images=target.images)
        except DataError as error:
            what, first, *_ = [*str(error).splitlines(), ""]
            yield f"eval.{key}: {what}{first and f', the first: {first.strip()}'}"


def _writers(target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield the folders of generated texts that another target or tokenizer wrote."""
    for number, source in enumerate(recipe.data.sources):
        if source.kind != "generated" or source.path is None or not Path(source.path).expanduser().exists():
            continue
        manifest = Generated(source).manifest()
        here = {"target": fingerprint_of(target.folder), "tokenizer": tokenizer_fingerprint(target.tokenizer)}
        for what, fingerprint in here.items():
            if manifest.get(f"{what}_fingerprint") != fingerprint:
                yield (
                    f"data.sources.{number}: {source.path} was written by {manifest.get('target')}, whose {what} has the fingerprint "
                    f"{manifest.get(f'{what}_fingerprint')}; that of {target.name} is {fingerprint}. Let this target write texts "
                    "(data.generate)"
                )
                break


def _window(target: ModelParts, recipe: Recipe) -> str | None:
    """Return a note on the cost of the target's sliding window; None if it has none that matters.

    Raises:
        CheckpointError: A layer has a state that cannot be rolled back.
    """
    window, longest = window_of(target.config, name=target.name), recipe.data.max_length
    if window is None or window > longest:
        return None
    return f"the target has a sliding window of {window} and data.max_length is {longest}: longer texts are decoded one at a time"


def _prompts_of_another_kind(target: ModelParts, recipe: Recipe) -> str | None:
    """Return a note where a chat target is validated or evaluated on Python source text."""
    prompts = {"eval.prompts": recipe.eval.prompts, "eval.validation_prompts": recipe.eval.validation_prompts}
    of_code = [key for key, files in prompts.items() if any(one.path in PYTHON_TEXT for one in files_of(files))]
    if not of_code or target.name.startswith(BUILTIN) or not getattr(target.tokenizer, "chat_template", None):
        return None
    return (
        f"WARNING: {target.name} is a chat model, and the prompts of {' and '.join(of_code)} are Python source text: figures "
        "on them say little about chats. Choose builtin:chat and builtin:chat_validation, or held-out prompts of your own"
    )


def _of_start(drafter: ModelParts, target: ModelParts, recipe: Recipe) -> Iterator[str]:
    """Yield why training cannot start from a drafter folder."""
    if isinstance(recipe.drafter, CausalLMSettings):
        drafter.check_causal_lm()
        if isinstance(recipe.drafter, SortedLMSettings):
            yield from exit_problems(drafter.config, recipe.drafter.exits)
        if isinstance(recipe.drafter, MatFormerSettings):
            found = [share_problem(share, drafter.config.intermediate_size) for share in recipe.drafter.widths]
            yield from filter(None, found)
        yield from _layers_in_parallel(drafter, recipe, num_layers=drafter.config.num_hidden_layers)
    else:
        check_folder(drafter.folder)
        path = drafter.folder / "drafttrain.json"
        if not path.is_file():
            yield f"{drafter.name}: no drafttrain.json in it, so it is not a drafter folder. Import a drafter of another project with: drafttrain import FOLDER"
            return
        if (kind := read_json(path).get("kind")) != recipe.drafter.kind:
            yield f"{drafter.name} is of kind {kind}, drafter.kind is {recipe.drafter.kind}"
            return
        yield from padding_problems(drafter.folder, num_tokens=target.num_ids)
    yield from _same_tokenizer(drafter, target)


def _layers_in_parallel(model: ModelParts, recipe: Recipe, *, num_layers: int) -> Iterator[str]:
    """Yield why so many layers of a model cannot run in parallel, if the evaluation wants that."""
    size = recipe.eval.layer_parallel_size
    if size > 1:
        problems = [*map(class_problem, model.config.architectures or ()), layer_problem(num_layers)]
        for problem in filter(None, problems):
            yield f"eval.layer_parallel_size: {size}: {problem}. Set 1"


def _reads_for(drafter: ModelParts, target: ModelParts) -> Iterator[str]:
    """Yield why a drafter folder cannot draft for a target: it has the target's tokenizer, or is a model with its own."""
    about = read_about(drafter.folder)
    model = about is None or about.own_tokenizer
    if not model or drafter.tokenizer.get_vocab() == target.tokenizer.get_vocab():
        yield from _same_tokenizer(drafter, target)
        return
    check_model_files(drafter.folder)
    yield from _shares(drafter, target)
    if drafter.num_rows < drafter.num_ids:
        yield f"{drafter.name} has {drafter.num_rows} embedding rows, but its tokenizer has {drafter.num_ids} tokens: the last ones have no row"


def _shares(own: ModelParts, target: ModelParts) -> Iterator[str]:
    """Yield why a drafter with its own tokenizer cannot draft for a target; print how many tokens they share."""
    rows = None if target.key == TARGET_TOKENIZER else target.num_rows
    other = OtherTokenizer(target.tokenizer, own.tokenizer, target_rows=rows, name=own.name)
    if other.problem is not None:
        yield other.problem
    else:
        say(f"{own.key}: {other}")


def _same_tokenizer(drafter: ModelParts, target: ModelParts) -> Iterator[str]:
    check_model_files(drafter.folder)
    about = read_about(drafter.folder)
    # A folder without tokenizer files has only the digest, which loading checks.
    if about is None or tokenizer_files(drafter.folder):
        whose = "recipe" if target.key == OWN_TOKENIZER else "target"
        check_same_tokenizer(target.tokenizer, drafter.tokenizer, drafter=drafter.name, whose=whose)
    rows = text_config(read_json(drafter.folder / "config.json")).get("vocab_size")
    alone = target.key in (OWN_TOKENIZER, TARGET_TOKENIZER)
    ids = target.num_ids if alone else min(target.num_ids, target.num_rows)
    if isinstance(rows, int) and rows < ids:
        yield f"{drafter.name} has {rows} embedding rows, but the target's tokenizer has {ids} tokens: the last ones have no row"


def _of_retrievers(recipe: Recipe, *, fetch: bool) -> Iterator[str]:
    """Yield what a retriever of the evaluation needs and is not installed, or cannot be read."""
    for one in components_of(recipe.eval.beside):
        if one.kind == "bm25" and find_spec("bm25s") is None:
            yield f"eval.beside: {NOT_INSTALLED}"
        if one.kind == "embeddings":
            encoder = ModelParts("eval.beside: retriever embeddings: model", one.model, fetch=fetch)
            yield from _problems_under(encoder.key, partial(_reads_tokenizer, encoder))


def _of_texts(recipe: Recipe) -> Iterator[str]:
    """Yield the text files that do not exist."""
    places = {f"data.sources.{number}": source for number, source in enumerate(recipe.data.sources)}
    if recipe.data.generate is not None:
        places |= recipe.data.generate.prompt_sources()
    for key, settings in places.items():
        if settings.kind in ("hub", "serving_logs") or getattr(settings, "path", None) is None:
            continue
        try:
            source = sources.build(settings)
            if isinstance(source, Versioned):
                source.version()
        except (DataError, OSError) as error:
            yield f"{key}: {error}"
    for key in PROMPTS:
        yield from (f"eval.{key}: {problem}" for problem in _missing(getattr(recipe.eval, key)))


def _missing(prompts: Prompts) -> Iterator[str]:
    """Yield the files of prompts that do not exist."""
    for file in files_of(prompts):
        try:
            prompt_file(file.path)
        except DataError as error:
            yield str(error)
