"""JSON lines: chats, ShareGPT conversations, prompt and completion, plain text, or token ids."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources


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
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _item(f"{path}:{number}", line)


def matching(pattern: str) -> list[Path]:
    """Return the files of a path or pattern, sorted.

    Raises:
        DataError: There is none.
    """
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
