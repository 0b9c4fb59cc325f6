"""Export: one file a format. A format turns a drafter folder into what other loaders read, and refuses what they would drop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drafttrain.core.registry import Registry
from drafttrain.environments.environment import Environment

if TYPE_CHECKING:
    from torch import Tensor

exporters = Registry("export format", "drafttrain.export")

FOLDER = "_folder"
"""Beside the fields of a target's config.json, as exporters get them: where its weights are."""


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter folder in memory: its kind, config.json, and the tensors of model.safetensors."""

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = field(default=())
    """What a format changed on its way, in words."""
    folder: Path | None = field(default=None, compare=False)
    """Where they were read from: its tokenizer is there."""


class Exporter(ABC):
    """One format."""

    reads: ClassVar[Mapping[str, str]]
    """The kinds of drafter that it can hold, and how loaders of it call each."""
    readers: ClassVar[str]
    """Who reads it."""
    environment: ClassVar[Environment | None] = None
    """The environment whose software writes it; None: drafttrain writes it."""
    fields_in: ClassVar[str] = "config.json"
    """The file that holds what `DrafterFiles.config` says."""

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what of a drafter folder this format has no place for; one that has any is not converted."""
        return []

    def target_problems(self, folder: Path, *, num_rows: int, end: int | None) -> list[str]:
        """Return why no drafter for the target of a folder can be written in this format; seen before anything is trained.

        Args:
            num_rows: Of the target's embedding.
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
        """Return what a loader of this format would refuse, or drop without a word."""

    def write(self, files: DrafterFiles, source: Path, folder: Path) -> None:
        """Write converted files, and beside them what else of the source folder belongs to them."""
        from drafttrain.export.folder import write_folder

        write_folder(files, source, folder)

    def read(self, folder: Path) -> DrafterFiles:
        """Return the files of a folder of this format.

        Raises:
            CheckpointError: It is none, or its weights cannot be read.
        """
        from drafttrain.export.folder import read_files

        return read_files(folder)

    def holds(self, folder: Path) -> bool:
        """Tell whether a folder is, by its files, one of this format."""
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
