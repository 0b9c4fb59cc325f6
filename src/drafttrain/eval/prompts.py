"""Prompts of an evaluation: files of JSON lines, or a built-in set from held-out text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.names import Names
from drafttrain.data_gen.sources import Item, RecordForm, images_key
from drafttrain.data_gen.sources.jsonl import lines
from drafttrain.target_model.image_reader import ImageReader

BUILTIN = "builtin:"
IDS = ("id", "question_id", "task_id")
"""Keys that name a prompt, the first that a record has; without one it is the number of the line."""


@dataclass(kw_only=True)
class PromptFile(RecordForm):
    """One of several files of prompts."""

    path: str = setting(help="JSON lines, gzip or not, or a built-in set.")
    domain: str | None = setting(
        None, help="Domain of all its prompts; null: `domain` or `category` of each record, else the name of the file."
    )
    number: int | None = setting(None, help="Prompts, taken evenly from the whole file; null: all.", ge=1)


Prompts = str | list[PromptFile]
"""One file, or several."""


def files_of(prompts: Prompts) -> list[PromptFile]:
    """Return the files of a setting."""
    return [PromptFile(path=prompts)] if isinstance(prompts, str) else prompts


def name_of(prompts: Prompts) -> str:
    """Return the paths of a setting in one line."""
    return ", ".join(file.path for file in files_of(prompts))


def prompt_file(name: str) -> Path:
    """Return the file of a built-in set, or the given file."""
    if name.startswith(BUILTIN):
        folder = Path(str(resources.files("drafttrain") / "eval" / "prompts_data"))
        path = folder / f"{name.removeprefix(BUILTIN)}.jsonl"
        if not path.exists():
            known = ", ".join(sorted(f"{BUILTIN}{file.stem}" for file in folder.glob("*.jsonl")))
            raise DataError(f"{name}: unknown built-in prompts. Available: {known}")
        return path
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{name}: no such file. Prompts are a file of JSON lines")
    return path


def read_prompts(
    prompts: Prompts,
    tokenizer: Any,
    *,
    prompt_tokens: int | None,
    images: ImageReader | None = None,
    max_length: int = 1 << 20,
    dropped: Collection[str] = (),
    limit: int | None = None,
) -> list[Prompt]:
    """Return the prompts of one file, or of several in turn, so that the first ones are of every file.

    Args:
        prompt_tokens: Plain text is cut to this many tokens.
        images: Reads images; None: prompts with images are refused.
        dropped: Ids of contaminated prompts, which are left out.
        limit: Most prompts that are returned.

    Raises:
        DataError: With every line of a file that is not a prompt.
    """
    encoder = Encoder(tokenizer, max_length, images=images)
    if isinstance(prompts, str):
        found = _of_file(PromptFile(path=prompts), encoder, prompt_tokens=prompt_tokens)
    else:
        found = _of_files(prompts, encoder, prompt_tokens=prompt_tokens)
    kept = [prompt for prompt in found if prompt.id not in dropped]
    if not kept:
        raise DataError(
            f"{name_of(prompts)}: no prompt is left of {len(found)} ({len(dropped)} are contaminated by the training text)"
        )
    return kept[:limit]


def _of_files(files: Sequence[PromptFile], encoder: Encoder, *, prompt_tokens: int | None) -> list[Prompt]:
    """Return the prompts of several files in turn; ids begin with the name of their file."""
    names, columns = Names(), []
    for file in files:
        label = names.own(file.domain or prompt_file(file.path).name.partition(".")[0])
        prompts = _of_file(file, encoder, prompt_tokens=prompt_tokens)
        columns.append([replace(one, id=f"{label}:{one.id}", domain=one.domain or label) for one in prompts])
    return [prompt for row in zip_longest(*columns) for prompt in row if prompt is not None]


def _of_file(file: PromptFile, encoder: Encoder, *, prompt_tokens: int | None) -> list[Prompt]:
    path, encoder = prompt_file(file.path), encoder.reading_as(file)
    problems, found, seen = [], list[Prompt](), set[str]()
    for number, item in lines(path, images=images_key(file)):
        try:
            prompt = _prompt(item, number, file, encoder, prompt_tokens=prompt_tokens)
            if prompt.id in seen:
                raise BadItem(f"id {prompt.id!r} occurs twice")
            seen.add(prompt.id)
            found.append(prompt)
        except BadItem as reason:
            problems.append(f"  line {number}: {reason}")
    if problems:
        raise DataError(f"{path}: {len(problems)} lines are not prompts\n" + "\n".join(problems[:20]))
    encoder.report(path.name)
    return list(_evenly(found, file.number))


def _prompt(item: Item, number: int, file: PromptFile, encoder: Encoder, *, prompt_tokens: int | None) -> Prompt:
    """Return the prompt of one line.

    Raises:
        BadItem: It is none.
    """
    if item.problem:
        raise BadItem(item.problem)
    value = encoder.reading.renamed(item.value)
    id = str(next((value[key] for key in IDS if value.get(key) is not None), number))
    ((_, tokens),) = encoder.prompts(item.value, id=id, prompt_tokens=None)
    if "text" in value and prompt_tokens is not None:
        tokens = tokens[:prompt_tokens]
    domain = file.domain or value.get("domain") or value.get("category") or ""
    chat, questions = encoder.later_questions(item.value)
    return Prompt(
        id,
        tokens,
        domain=str(domain),
        answer=str(value.get("answer", "")),
        language=str(value.get("language") or value.get("lang") or ""),
        questions=questions,
        images=encoder.images_of(item.value),
        chat=chat,
    )


def _evenly(prompts: Sequence[Prompt], number: int | None) -> Iterator[Prompt]:
    """Yield this many prompts at equal distances, so that a file sorted by topic gives every topic."""
    count = len(prompts) if number is None else min(number, len(prompts))
    yield from (prompts[place * len(prompts) // count] for place in range(count))
