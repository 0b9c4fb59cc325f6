"""A folder of text files, or one text file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources, stamps


@dataclass(kw_only=True)
class TextSettings(WeightedSettings):
    """Text files, each a document."""

    path: str = setting(help="A folder or a file.")
    pattern: str = setting("**/*.txt", help="Which files of a folder.")


@sources.register("text", TextSettings)
class Text:
    """The files of a folder in the order of their names."""

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield every file that is UTF-8."""
        for path in self._paths():
            try:
                yield Item(str(path), {"text": path.read_text(encoding="utf-8")})
            except UnicodeDecodeError as error:
                yield Item(str(path), "", f"not UTF-8: {error}")

    def version(self) -> Any:
        """Return a value that changes with the files."""
        return stamps(self._paths())

    def _paths(self) -> list[Path]:
        root = Path(self.settings.path).expanduser()
        paths = (
            [root] if root.is_file() else sorted(path for path in root.glob(self.settings.pattern) if path.is_file())
        )
        if not paths:
            raise DataError(f"{root}: no file here matches {self.settings.pattern!r}")
        return paths
