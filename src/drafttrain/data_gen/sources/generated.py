"""Texts that the target generated, for this run or another one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.files import sha256_of
from drafttrain.core.foreign import read_json
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources
from drafttrain.data_gen.sources.jsonl import lines


@dataclass(kw_only=True)
class GeneratedSettings(WeightedSettings):
    """Texts that the target generates by data.generate, before the sources are read."""

    path: str | None = setting(
        None, help="Folder of texts that another run finished, such as runs/NAME/data/generated; null: this run's."
    )


@sources.register("generated", GeneratedSettings)
class Generated:
    """The records of a folder of shards."""

    def __init__(self, settings: GeneratedSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield every record."""
        for shard in self.version():
            path = self._folder() / shard["file"]
            for number, item in lines(path):
                yield replace(item, where=f"{path}:{number}")

    def manifest(self) -> dict[str, Any]:
        """Return the description of the texts: who wrote them, and the shards with their hashes.

        Raises:
            DataError: The texts are not complete.
        """
        manifest = self._folder() / "manifest.json"
        if not manifest.exists():
            raise DataError(f"{self._folder()}: has no manifest.json: not a complete folder of shards")
        content: dict[str, Any] = read_json(manifest)
        return content

    def version(self) -> Any:
        """Return the shards with their hashes, as the manifest lists them.

        Raises:
            DataError: A shard differs from the manifest.
        """
        shards = self.manifest()["shards"]
        for shard in shards:
            path = self._folder() / shard["file"]
            if not path.exists() or sha256_of(path) != shard["sha256"]:
                raise DataError(
                    f"{path}: differs from manifest.json (sha256): remove both, and the run that wrote them writes them again"
                )
        return shards

    def _folder(self) -> Path:
        if self.settings.path is None:
            raise DataError("source generated: the shards of this run are not generated yet: run drafttrain gen")
        return Path(self.settings.path).expanduser()
