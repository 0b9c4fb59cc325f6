"""Header of a GGUF file: its settings, and where its tensors are. No tensor is read, and lists of texts are counted."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.core.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
TEXT, LIST = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of the types of fixed size, by their number in the file."""
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in the file, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """As in PyTorch: the fastest dimension last."""
    type: int
    start: int
    """Position of its first byte in the file."""

    @property
    def num_values(self) -> int:
        """Number of its values."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class GgufHeader:
    """Settings by key, and the tensors."""

    path: Path
    settings: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    @property
    def architecture(self) -> str:
        """Name of the architecture in llama.cpp."""
        return str(self.settings.get("general.architecture"))

    @property
    def num_values(self) -> int:
        """Number of values of all tensors."""
        return sum(tensor.num_values for tensor in self.tensors)

    def own(self, key: str) -> Any:
        """Return a setting of the architecture; None: the file does not have it."""
        return self.settings.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> GgufHeader:
    """Return the header of a file.

    Raises:
        CheckpointError: It is not a GGUF file, or ends within its header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path}: is not a GGUF file (it does not start with the letters GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _Reader(path, content).header()
            except struct.error as error:
                raise CheckpointError(
                    f"{path}: is truncated: it ends within its header, after {size:,} bytes. Fetch it again"
                ) from error
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{path}: is damaged: a name in its header is not UTF-8. Fetch it again"
                ) from error


class _Reader:
    """Reads a header from front to back. Every jump ends in a read within the file, so wrong counts end it."""

    single: ClassVar[dict[int, struct.Struct]] = {kind: struct.Struct(f"<{one}") for kind, one in NUMBERS.items()}

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = len(MAGIC)

    def header(self) -> GgufHeader:
        """Return the header."""
        if (version := self._number(4)) not in VERSIONS:
            raise CheckpointError(f"{self._path}: is of GGUF version {version}, must be 2 or 3")
        num_tensors, num_settings = self._number(10), self._number(10)
        settings = dict(self._setting() for _ in range(num_settings))
        tensors = [self._tensor() for _ in range(num_tensors)]
        alignment = settings.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self._path}: general.alignment must be 1 or more, got {alignment!r}")
        start = -(-self._at // alignment) * alignment
        placed = (StoredTensor(one.name, one.shape, one.type, start + one.start) for one in tensors)
        return GgufHeader(self._path, settings, tuple(placed))

    def _number(self, kind: int) -> Any:
        (value,) = self.single[kind].unpack_from(self._content, self._at)
        self._at += self.single[kind].size
        return value

    def _text(self) -> str:
        length = self._number(10)
        self._at += length
        if self._at > len(self._content):
            raise struct.error("text beyond the end of the file")
        return self._content[self._at - length : self._at].decode()

    def _setting(self) -> tuple[str, Any]:
        key, kind = self._text(), self._number(4)
        return key, self._list() if kind == LIST else self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind not in NUMBERS:
            raise CheckpointError(f"{self._path}: is damaged: its header has a value of type {kind}. Fetch it again")
        return self._number(kind)

    def _list(self) -> Any:
        """Return the numbers of a list, or how many texts it has."""
        kind, count = self._number(4), self._number(10)
        if kind in NUMBERS:
            values = struct.unpack_from(f"<{count}{NUMBERS[kind]}", self._content, self._at)
            self._at += count * self.single[kind].size
            return list(values)
        for _ in range(count):
            self._value(kind)
        return count

    def _tensor(self) -> StoredTensor:
        name, dimensions = self._text(), self._number(4)
        if dimensions > MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: is damaged: {name!r} has {dimensions} dimensions. Fetch it again")
        sizes = [self._number(10) for _ in range(dimensions)]
        return StoredTensor(name, tuple(reversed(sizes)), self._number(4), self._number(10))
