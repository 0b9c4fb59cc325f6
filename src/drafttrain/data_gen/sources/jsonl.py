"""JSON lines: chats, ShareGPT conversations, prompt and completion, plain text, or token ids."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources, stamps


@dataclass(kw_only=True)
class JSONLSettings(WeightedSettings):
    """A JSON object a line: messages, conversations, prompt + completion, text, or tokens."""

    path: str = setting(help="A file, or a pattern such as data/*.jsonl.")


@sources.register("jsonl", JSONLSettings)
class JSONL:
    """Lines of one or more files, in the order of their names."""

    def __init__(self, settings: JSONLSettings) -> None:
        self.path = settings.path

    def items(self) -> Iterator[Item]:
        """Yield every line; one that is no JSON object is yielded with its problem."""
        for path in matching(self.path):
            for number, item in lines(path):
                yield replace(item, where=f"{path}:{number}")

    def version(self) -> Any:
        """Return what changes with the files."""
        return stamps(matching(self.path))


def lines(path: Path) -> Iterator[tuple[int, Item]]:
    """Yield the lines of one file with their numbers, from 1; empty ones are left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _item(f"line {number}", line)


def matching(pattern: str) -> list[Path]:
    """Return the files of a path or pattern, sorted.

    Raises:
        DataError: There is none.
    """
    if Path(pattern).expanduser().is_file():
        return [Path(pattern).expanduser()]
    paths = sorted(Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise DataError(f"{pattern}: no such file, and no file matches it as a pattern")
    return files


def _item(where: str, line: bytes) -> Item:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Item(where, line.decode(errors="replace").rstrip("\n"), f"not JSON: {error}")
    if not isinstance(value, dict):
        return Item(where, value, f"a JSON object is needed, got {type(value).__name__}")
    return Item(where, value)
