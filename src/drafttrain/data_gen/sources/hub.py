"""A data set of the hub, or a local folder that `datasets` can read."""

from collections.abc import Iterator
from dataclasses import dataclass

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources


@dataclass(kw_only=True)
class HubSettings(WeightedSettings):
    """A data set by its id, read through `datasets`."""

    path: str = setting(help="Hub id (owner/name), or a local folder of data files.")
    name: str | None = setting(None, help="Configuration of the data set.")
    split: str = setting("train", help="Split.")
    revision: str | None = setting(None, help="Branch, tag or commit.")
    rename: dict[str, str] = setting({}, help="Columns by the name that is wanted here: {text: content}.")


@sources.register("hub", HubSettings)
class Hub:
    """Rows of one split."""

    def __init__(self, settings: HubSettings) -> None:
        self.settings = settings

    def items(self) -> Iterator[Item]:
        """Yield every row."""
        import datasets

        wanted = self.settings
        try:
            rows = datasets.load_dataset(wanted.path, wanted.name, split=wanted.split, revision=wanted.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise DataError(
                f"{wanted.path}: no data set could be read here (split {wanted.split!r}): {error}"
            ) from error
        for number, row in enumerate(rows):
            value = dict(row) | {new: row[old] for new, old in wanted.rename.items() if old in row}
            yield Item(
                f"{wanted.path}:{number}", {name: content for name, content in value.items() if content is not None}
            )
