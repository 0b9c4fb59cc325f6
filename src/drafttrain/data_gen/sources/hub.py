"""A data set of the hub, or a local folder that `datasets` can read."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, RecordSettings, sources, stamps, without_nulls

TIMEOUT_SECONDS = 10.0


@dataclass(kw_only=True)
class HubSettings(RecordSettings):
    """A data set by its id, read through `datasets`."""

    path: str = setting(help="Hub id (owner/name), or a local folder of data files.")
    name: str | None = setting(None, help="Configuration of the data set.")
    split: str = setting("train", help="Split.")
    revision: str | None = setting(None, help="Branch, tag or commit.")


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
            rows = datasets.load_dataset(
                wanted.path, wanted.name, split=wanted.split, revision=self._commit or wanted.revision
            )
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise DataError(f"{wanted.path}: no data set can be read here (split {wanted.split!r}): {error}") from error
        for number, row in enumerate(rows):
            yield Item(f"{wanted.path}:{number}", without_nulls(dict(row)))

    def version(self) -> Any:
        """Return the commit of a data set of the hub, or a value that changes with the files of a folder; None: unknown."""
        folder = Path(self.settings.path).expanduser()
        if folder.exists():
            return stamps(sorted(path for path in folder.rglob("*") if path.is_file()))
        return self._commit

    @functools.cached_property
    def _commit(self) -> str | None:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        wanted = self.settings
        if Path(wanted.path).expanduser().exists():
            return None
        try:
            found = huggingface_hub.HfApi().dataset_info(wanted.path, revision=wanted.revision, timeout=TIMEOUT_SECONDS)
        except (HfHubHTTPError, HFValidationError, OSError):
            # Offline, `datasets` reads its own cache, whose commit is not known.
            return None
        return found.sha
