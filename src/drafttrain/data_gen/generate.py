"""Texts that the target generates: answers to prompts, at several temperatures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.data_gen.backends import Backend, Plan, Task, backends
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.names import Names, content_name, shared_names
from drafttrain.data_gen.quarantine import read_items
from drafttrain.data_gen.questions import write_questions
from drafttrain.data_gen.settings import PROMPTS, GenerateSettings
from drafttrain.data_gen.shards import Tasks, write_shards
from drafttrain.data_gen.sources import Item, PromptSource, Source, content_of, sources
from drafttrain.target_model import Target


def generate(
    settings: GenerateSettings,
    target: Target,
    folder: Path,
    *,
    seed: int,
    max_length: int,
) -> Path:
    """Write the texts of `data.generate` that are missing; return their folder. Several processes divide the work.

    Texts of other settings, of another target or seed, are kept beside the folder.

    Raises:
        DataError: The backend cannot continue.
    """
    plan = Plan(
        target=target,
        folder=folder,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=seed,
    )
    backend: Backend = backends.build(settings.backend, plan)
    return write_shards(
        folder,
        lambda: _tasks(settings, target, folder, seed=seed, max_length=max_length),
        about=_about(settings, backend, plan, max_length=max_length),
        backend=backend,
        target=target,
        size=settings.records_per_shard,
        what="generating",
    )


def _about(settings: GenerateSettings, backend: Backend, plan: Plan, *, max_length: int) -> dict[str, Any]:
    """Return what the texts depend on.

    The built-in backend is not named, so that shards written before other backends existed stay valid.
    """
    asked = settings.prompts
    prompts = [content_of(one) for one in asked] if isinstance(asked, list) else content_of(asked)
    content = asdict(settings) | {"prompts": prompts}
    del content["backend"]
    named = backend.content()
    return plan.about() | {"max_length": max_length, "settings": content | ({"backend": named} if named else {})}


def _tasks(settings: GenerateSettings, target: Target, folder: Path, *, seed: int, max_length: int) -> Tasks:
    """Return the texts to write: prompts of all sources, shuffled and mixed by weight, with the temperatures in turn."""
    names = Names()
    mixed: list[tuple[float, Prompt]] = []
    for key, chosen in settings.prompt_sources().items():
        found = (
            [] if chosen.weight == 0 else _prompts(key, chosen, settings, target, folder, seed=seed, length=max_length)
        )
        prompts = [replace(prompt, id=names.own(prompt.id)) for prompt in found]
        prompts.sort(key=lambda prompt: stream_seed(seed, "prompt order", prompt.id))
        mixed += [((place + 0.5) / chosen.weight, prompt) for place, prompt in enumerate(prompts)]
    mixed.sort(key=lambda prompt: prompt[0])
    num_shared = names.num_shared
    if num_shared:
        say(f"{PROMPTS}: {shared_names(num_shared)}")
    if len(mixed) < settings.num_records:
        say(
            f"{len(mixed):,} prompts for {settings.num_records:,} texts: prompts are used again, with other random numbers"
        )
    tasks = []
    for number in range(settings.num_records):
        again, place = divmod(number, len(mixed))
        _, prompt = mixed[place]
        # A prompt that is used again takes the next temperature: greedy decoding would repeat the text.
        temperature = settings.temperatures[(place + again) % len(settings.temperatures)]
        sampling = Sampling(temperature, top_p=1.0 if temperature == 0 else settings.top_p)
        id = names.own(prompt.id) if again else prompt.id
        tasks.append(Task(id, prompt.tokens, sampling, prompt.images))
    return tasks, {"shared_names": num_shared} if num_shared else {}


def _prompts(
    key: str, chosen: Any, settings: GenerateSettings, target: Target, folder: Path, *, seed: int, length: int
) -> Iterator[Prompt]:
    """Yield the prompts of one source; bad ones are quarantined."""
    if chosen.kind == "magpie" and chosen.path is None:
        chosen = write_questions(chosen, settings, target, folder.with_name(key.replace(PROMPTS, "prompts")), seed=seed)
    encoder = Encoder(target.tokenizer, length, images=target.images).reading_as(chosen)
    source: Source = sources.build(chosen)

    def read(item: Item) -> list[Prompt]:
        if isinstance(source, PromptSource):
            return [Prompt(id, tokens) for id, tokens in source.prompts(item, encoder)]
        images = encoder.images_of(item.value)
        found = encoder.prompts(item.value, id=content_name(item.value), prompt_tokens=settings.prompt_tokens)
        return [Prompt(id, tokens, images=images) for id, tokens in found]

    yield from read_items(
        source,
        read,
        folder / f"{key.replace(PROMPTS, 'quarantine')}.jsonl",
        name=key,
        max_items=chosen.max_items,
        max_lost_share=chosen.max_lost_share,
    )
    encoder.report(key)
