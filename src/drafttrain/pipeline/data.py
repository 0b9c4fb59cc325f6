"""The data of a run: texts that the target writes, encoded records, contaminated prompts, batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.digests import files_digest
from drafttrain.core.errors import DataError, RecipeError
from drafttrain.data_gen.backends.vllm import environment_on
from drafttrain.data_gen.contamination import is_current, read_contamination
from drafttrain.data_gen.training_data import TrainingData, generate_texts, note_contamination, prepare
from drafttrain.distributed.collectives import first_before_others
from drafttrain.distributed.world import world
from drafttrain.environments.environment import is_installed
from drafttrain.eval.later_turns import questions_of
from drafttrain.eval.prompts import Prompts, name_of, read_prompts
from drafttrain.pipeline.model_parts import target_parts
from drafttrain.pipeline.run import Run
from drafttrain.target_model.device import kind_of_device
from drafttrain.target_model.image_reader import processor_files
from drafttrain.target_model.tokenizer import tokenizer_files, tokenizer_folder
from drafttrain.training.settings import TrainSettings

FEW_WIDTHS = 128
"""On a GPU, and when compiled, row widths are rounded up to this multiple: kernels are chosen by shape, so few shapes should occur."""

FEW_WIDTHS_IN_HALF = 32
"""The same on a CPU in bfloat16, which compiles code for every number of rows (`core.few_sizes`)."""


def write_texts(run: Run) -> None:
    """Let the target write the texts of `data.generate`; texts that exist are skipped."""
    generate_texts(run.recipe.data, lambda: run.target, run.folder.data, seed=run.recipe.seed)


def check_data_engines(recipe: Recipe, data: Path) -> None:
    """Refuse a recipe whose texts or hidden states come from vLLM if vLLM is not installed, before a target is loaded.

    Args:
        data: Folder of the run's data. vLLM is not needed any more for what is complete.

    Raises:
        RecipeError: Naming the command that installs vLLM, and what works without it.
    """
    environment = environment_on(kind_of_device(recipe.target.device))
    if is_installed(environment):
        return
    command = f"drafttrain engines install {environment.name}"
    generate, problems = recipe.data.generate, []
    if generate is not None and generate.backend.kind == "vllm" and not (data / "generated" / "manifest.json").exists():
        problems.append(
            f"data.generate.backend: vllm is not installed here: {command}; or let drafttrain write the "
            "texts itself, more slowly: 'data.generate.backend={kind: builtin}'"
        )
    if recipe.data.states.kind == "vllm" and not any(data.glob("*-cache/cache.json")):
        problems.append(
            f"data.states: vllm is not installed here: {command}; or let drafttrain load the target: "
            "'data.states={kind: builtin}'"
        )
    if problems:
        raise RecipeError(recipe.name, problems)


def training_data(run: Run) -> TrainingData:
    """Return the training data. The target's outputs are cached if the recipe says so, and contaminated prompts are stored."""
    with first_before_others("it encodes the sources"):
        data = encoded_data(run)
    run.cache_target(data)
    with first_before_others("it checks the evaluation prompts for contamination"):
        if not is_current(run.folder.contamination):
            _note_contamination(run, data)
    return data


def encoded_data(run: Run) -> TrainingData:
    """Return the training data without cached target outputs."""
    data = prepare(
        run.recipe.data,
        run.folder.data,
        tokenizer=run.tokenizer,
        tokenizer_fingerprint=files_digest(_files_that_encode(run)),
        images=run.images,
        seed=run.recipe.seed,
        num_records=run.recipe.train.max_steps * run.recipe.train.batch_size,
    )
    if run.has_target():
        _check_rows(data, num_rows=target_parts(run.recipe.target).num_rows, tokenizer=run.tokenizer)
    return data


def _files_that_encode(run: Run) -> list[Path]:
    """Return the files that determine how records become tokens."""
    folder = tokenizer_folder(run.recipe.target)
    return [*tokenizer_files(folder), *(processor_files(folder) if run.recipe.target.images else [])]


def _check_rows(data: TrainingData, *, num_rows: int, tokenizer: Any) -> None:
    """Refuse records with tokens that have no row in the target's embedding.

    Raises:
        DataError: Naming the first such token of each source.
    """
    problems = []
    for store, source in zip(data.stores, data.settings.sources, strict=True):
        if int(store.tokens.max(initial=0)) < num_rows:
            continue
        place = int((store.tokens >= num_rows).argmax())
        record = store[int((store.starts <= place).sum()) - 1]
        token = tokenizer.convert_ids_to_tokens(int(store.tokens[place]))
        problems.append(f"source {source.kind}: {record.id} holds {token} (id {store.tokens[place]})")
    if problems:
        raise DataError(
            f"the target has {num_rows} embedding rows, and none for: {'; '.join(problems)}. Remove these tokens from the text"
        )


def _note_contamination(run: Run, data: TrainingData) -> None:
    wanted = run.recipe.eval
    prompts = {
        (name_of(files), prompt.id): prompt
        for files in (wanted.prompts, wanted.validation_prompts)
        for prompt in read_prompts(files, run.tokenizer, prompt_tokens=wanted.prompt_tokens, images=run.images)
    }
    questions = {key: questions_of(prompt, run.tokenizer) for key, prompt in prompts.items()}
    images = {key: prompt.images for key, prompt in prompts.items() if prompt.images}
    note_contamination(data, questions, run.folder.contamination, images=images)


def contaminated_prompts(run: Run, prompts: Prompts) -> list[str]:
    """Return the ids of those prompts that the training text contains; prompts that are new to the run are compared now."""
    path = run.folder.contamination
    if not is_current(path) and run.folder.data.exists():
        _note_contamination(run, encoded_data(run))
    return read_contamination(path, prompts=name_of(prompts))


def own_batches(data: Any, settings: Any, *, device: Any) -> Callable[[int], list[Any]]:
    """Return the function from a step to the micro-batches of this process, for training on a device."""
    here = world()
    return partial(
        data.of_step,
        batch_size=settings.batch_size,
        records_per_device=settings.records_per_device,
        rank=here.rank,
        world_size=here.size,
        multiple=_multiple(settings, device),
    )


def say_how_full(data: TrainingData, settings: TrainSettings, *, device: torch.device) -> None:
    """Print how much of the rows of a training is padding."""
    packed, single = data.filled(
        batch_size=settings.batch_size,
        records_per_device=settings.records_per_device,
        world_size=world().size,
        multiple=_multiple(settings, device),
    )
    say(f"packing: {packed:.0%} of the rows are tokens, the rest is padding; with one record a row, {single:.0%}")


def _multiple(settings: Any, device: torch.device) -> int:
    if settings.compile or device.type == "cuda":
        return FEW_WIDTHS
    return FEW_WIDTHS_IN_HALF if settings.precision == "bf16-mixed" else 1
