"""Prompts of an evaluation: a file of JSON lines, or a built-in set from held-out text."""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Prompt
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources.jsonl import lines

BUILTIN = "builtin:"


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
    name: str,
    tokenizer: Any,
    *,
    prompt_tokens: int | None,
    max_length: int = 1 << 20,
    dropped: Collection[str] = (),
    limit: int | None = None,
) -> list[Prompt]:
    """Return the prompts of a file.

    Args:
        prompt_tokens: Plain text is cut to this many tokens.
        dropped: Ids of contaminated prompts, which are left out.
        limit: Most prompts that are returned.

    Raises:
        DataError: With every line that is not a prompt.
    """
    path = prompt_file(name)
    encoder = Encoder(tokenizer, max_length)
    problems, found, seen = [], [], set[str]()
    for number, item in lines(path):
        try:
            if item.problem:
                raise BadItem(item.problem)
            value = item.value
            id = str(number if value.get("id") is None else value["id"])
            if id in seen:
                raise BadItem(f"id {id!r} occurs twice")
            seen.add(id)
            ((_, tokens),) = encoder.prompts(value, id=id, prompt_tokens=None)
            if "text" in value and prompt_tokens is not None:
                tokens = tokens[:prompt_tokens]
            found.append(Prompt(id, tokens, domain=str(value.get("domain", "")), answer=str(value.get("answer", ""))))
        except BadItem as reason:
            problems.append(f"  line {number}: {reason}")
    if problems:
        raise DataError(f"{path}: {len(problems)} lines are not prompts\n" + "\n".join(problems[:20]))
    encoder.report(path.name)
    kept = [prompt for prompt in found if prompt.id not in dropped]
    if not kept:
        raise DataError(
            f"{path}: no prompt is left of {len(found)} ({len(dropped)} are contaminated by the training text)"
        )
    return kept[:limit]
