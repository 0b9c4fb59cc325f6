"""Parquet files whose columns are named like the keys of JSON lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.record_images import located
from drafttrain.data_gen.sources import Item, RecordSettings, images_key, sources, stamps, without_nulls
from drafttrain.data_gen.sources.jsonl import matching


@dataclass(kw_only=True)
class ParquetSettings(RecordSettings):
    """Rows whose columns are the keys of records."""

    path: str = setting(help="A file, or a pattern such as data/*.parquet.")


@sources.register("parquet", ParquetSettings)
class Parquet:
    """Rows of one or more files, in the order of their names."""

    def __init__(self, settings: ParquetSettings) -> None:
        self.path = settings.path
        self.images = images_key(settings)

    def items(self) -> Iterator[Item]:
        """Yield every row."""
        import pyarrow
        import pyarrow.parquet

        for path in matching(self.path):
            try:
                file = pyarrow.parquet.ParquetFile(path)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise DataError(f"{path}: not a Parquet file: {error}") from error
            number, folder = 0, path.parent.absolute()
            for batch in file.iter_batches():
                try:
                    rows = batch.to_pylist(maps_as_pydicts="strict")
                except KeyError as error:
                    raise DataError(f"{path}: from row {number}: a map holds a key twice: {error}") from error
                for row in rows:
                    yield Item(f"{path}:{number}", located(without_nulls(row), folder, under=self.images))
                    number += 1

    def version(self) -> Any:
        """Return a value that changes with the files."""
        return stamps(matching(self.path))
