"""Images of texts, and where the texts that have some lie in a packed batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import DataError


@dataclass(frozen=True)
class Image:
    """An encoded image (PNG, JPEG, ...): its bytes, or the file that holds them."""

    digest: str
    """SHA-256 of the bytes."""
    path: str | None = None
    """None: the bytes are here."""
    content: bytes | None = None

    @classmethod
    def of_bytes(cls, content: bytes) -> Image:
        """Return an image of these bytes."""
        return cls(hashlib.sha256(content).hexdigest(), content=content)

    @classmethod
    def of_file(cls, path: Path) -> Image:
        """Return the image in a file, which is read again each time that its bytes are needed.

        Raises:
            OSError: It cannot be read.
        """
        return cls(hashlib.sha256(path.read_bytes()).hexdigest(), path=str(path))

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            DataError: The file is gone, or its content has changed.
        """
        if self.content is not None:
            return self.content
        assert self.path is not None
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: the image of a record cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise DataError(
                f"{self.path}: the image has changed since its record was encoded: remove the folder "
                "of its source in data of the run folder (such as data/0-jsonl), and the records are encoded again"
            )
        return content


@dataclass(frozen=True)
class PlacedImages:
    """The images of one document of a packed batch."""

    row: int
    column: int
    """Where the document begins."""
    images: Sequence[Image]
