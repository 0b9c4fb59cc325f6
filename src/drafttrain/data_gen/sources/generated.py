"""What the target wrote for this run, or for another one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings


@dataclass(kw_only=True)
class GeneratedSettings(WeightedSettings):
    """Text that the target writes by data.generate; its shards are made first."""

    path: str | None = setting(None, help="Folder of shards; null: this run's own.")


@sources.register("generated", GeneratedSettings)
class Generated:
    """The records of a folder of shards."""

    def __init__(self, settings: GeneratedSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield every record."""
        if self.settings.path is None:
            raise DataError("source generated: the shards of this run are not made yet (drafttrain gen)")
        if not (Path(self.settings.path) / "manifest.json").exists():
            raise DataError(f"{self.settings.path}: no manifest.json here: not a whole folder of shards")
        yield from JSONL(JSONLSettings(path=str(Path(self.settings.path) / "shard-*.jsonl"))).items()
