"""Records as JSON, gzip or not: one object a line, or one array of objects in any layout."""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.record_images import located
from drafttrain.data_gen.record_keys import IMAGES
from drafttrain.data_gen.sources import Item, RecordSettings, images_key, sources, stamps

GZIP = b"\x1f\x8b"
"""First bytes of a gzip file."""
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(kw_only=True)
class JSONLSettings(RecordSettings):
    """JSON lines, or an array of JSON objects; docs/data.md lists the forms of a record."""

    path: str = setting(help="A file, or a pattern such as data/*.jsonl.")


@sources.register("jsonl", JSONLSettings)
class JSONL:
    """Records of one or more files, in the order of their names."""

    def __init__(self, settings: JSONLSettings) -> None:
        self.path = settings.path
        self.images = images_key(settings)

    def items(self) -> Iterator[Item]:
        """Yield every record; anything but a JSON object is yielded with its problem."""
        for path in matching(self.path):
            for number, item in lines(path, images=self.images):
                yield replace(item, where=f"{path}:{number}")

    def version(self) -> Any:
        """Return a value that changes with the files."""
        return stamps(matching(self.path))


def lines(path: Path, *, images: str = IMAGES) -> Iterator[tuple[int, Item]]:
    """Yield the lines of one file, or the records of its array, numbered from 1; empty lines are skipped.

    Args:
        images: The key of images, whose paths are relative to the file.

    Raises:
        DataError: An array is broken: records after the break cannot be separated.
    """
    folder = path.parent.absolute()
    for number, item in _lines(path):
        value = located(item.value, folder, under=images)
        yield number, item if value is item.value else replace(item, value=value)


def _lines(path: Path) -> Iterator[tuple[int, Item]]:
    try:
        with _opened(path) as file:
            if _begins_array(file):
                file.seek(0)
                yield from _array(path, file)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, _item(f"line {number}", text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: a damaged gzip file: {error}") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file, unpacking gzip."""
    with path.open("rb") as file:
        is_packed = file.read(len(GZIP)) == GZIP
    return cast(BinaryIO, gzip.open(path, "rb")) if is_packed else path.open("rb")


def _begins_array(file: BinaryIO) -> bool:
    """Return whether a file is one array: its first line begins an array, and is not a complete one followed by other lines."""
    first = b""
    while not first:
        line = file.readline()
        if not line:
            return False
        first = line.removeprefix(codecs.BOM_UTF8).strip()
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not any(line.strip() for line in file)


def _array(path: Path, file: BinaryIO) -> Iterator[tuple[int, Item]]:
    """Yield the records of an array one by one; memory holds the file's text, not all records."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a JSON array that is not UTF-8: {error}") from error
    decoder, number = json.JSONDecoder(), 0
    place = _next(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        number += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, place) + 1
            raise DataError(f"{path}: line {line}: record {number} of the JSON array is broken: {error}") from error
        yield number, _record(f"record {number}", value)
        place = _next(text, place)
        if text[place : place + 1] not in (",", "]"):
            line = text.count("\n", 0, place) + 1
            raise DataError(f"{path}: line {line}: ',' or ']' must follow record {number} of the JSON array")
        if text[place] == ",":
            place = _next(text, place + 1)
    if text[place + 1 :].strip():
        line = text.count("\n", 0, place) + 1
        raise DataError(f"{path}: line {line}: text follows the end of the JSON array")


def _next(text: str, place: int) -> int:
    """Return the place of the next character that is not white space."""
    found = SPACE.match(text, place)
    return place if found is None else found.end()


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
    return _record(where, value)


def _record(where: str, value: Any) -> Item:
    if not isinstance(value, dict):
        return Item(where, value, f"must be a JSON object, got {type(value).__name__}")
    return Item(where, value)
