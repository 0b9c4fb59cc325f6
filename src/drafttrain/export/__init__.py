"""Export: one file a format. A format converts a drafter folder for other loaders and refuses what they would drop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.core.registry import Registry
from drafttrain.environments.environment import Environment
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_files, write_folder

exporters = Registry("export format", "drafttrain.export")

FOLDER = "_folder"
"""Key under which exporters find the folder of the target's weights, beside the fields of its config.json."""


class Exporter(ABC):
    """One format."""

    reads: ClassVar[Mapping[str, str]]
    """The kinds of drafter that it can hold, and the loaders' name for each."""
    readers: ClassVar[str]
    """The software that reads it."""
    environment: ClassVar[Environment | None] = None
    """The environment whose software writes it; None: drafttrain writes it."""
    fields_in: ClassVar[str] = "config.json"
    """The file that holds `DrafterFiles.config`."""

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what in a drafter folder this format cannot hold; if there is any, the folder is not converted."""
        return []

    def target_problems(self, folder: Path, *, num_rows: int, end: int | None) -> list[str]:
        """Return why this format cannot hold any drafter for a target; checked before training.

        Args:
            folder: The target's folder.
            num_rows: Rows of the target's embedding.
            end: The token that ends a text.
        """
        return []

    @abstractmethod
    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the files of this format.

        Args:
            target_config: config.json of the target.
        """

    @abstractmethod
    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what a loader of this format would refuse or silently drop."""

    def write(self, files: DrafterFiles, source: Path, folder: Path) -> None:
        """Write converted files, and copy the other files of the source folder that belong to them."""
        write_folder(files, source, folder)

    def read(self, folder: Path) -> DrafterFiles:
        """Return the files of a folder of this format.

        Raises:
            CheckpointError: The folder is not of this format, or its weights cannot be read.
        """
        return read_files(folder)

    def holds(self, folder: Path) -> bool:
        """Return whether the files of a folder are of this format."""
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
