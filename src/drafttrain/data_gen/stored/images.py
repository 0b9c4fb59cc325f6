"""The images of stored records: those in files stay there, with their digests; the bytes of others are joined in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from drafttrain.core.images import Image

INDEX, CONTENT = "images.json", "images.bin"


class ImageStore:
    """The images of records, by number of the record."""

    def __init__(self, folder: Path) -> None:
        self._content = folder / CONTENT
        self._places: list[list[tuple[str, str | None, int, int]]] = json.loads(
            (folder / INDEX).read_text(encoding="utf-8")
        )

    @classmethod
    def open(cls, folder: Path) -> ImageStore | None:
        """Return the images of a store; None: its records have none."""
        return cls(folder) if (folder / INDEX).exists() else None

    def __getitem__(self, record: int) -> list[Image]:
        return [
            Image(digest, path=path, content=None if path is not None else self._read(begin, size))
            for digest, path, begin, size in self._places[record]
        ]

    def digests(self) -> set[str]:
        """Return the digests of all images."""
        return {digest for places in self._places for digest, *_ in places}

    def _read(self, begin: int, size: int) -> bytes:
        with self._content.open("rb") as file:
            file.seek(begin)
            return file.read(size)


def write_images(folder: Path, images: Sequence[Sequence[Image]]) -> None:
    """Write the images of each record into the folder of a store."""
    places: list[list[tuple[str, str | None, int, int]]] = []
    with (folder / CONTENT).open("wb") as file:
        for own in images:
            found = []
            for image in own:
                content = b"" if image.path is not None else image.read()
                found.append((image.digest, image.path, file.tell(), len(content)))
                file.write(content)
            places.append(found)
    (folder / INDEX).write_text(json.dumps(places), encoding="utf-8")
