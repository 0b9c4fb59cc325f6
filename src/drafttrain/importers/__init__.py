"""Importers: one file a layout. A layout turns a folder that somebody else trained into a drafter folder, or says all that hinders it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drafttrain.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from drafttrain.export.drafter_files import DrafterFiles
    from drafttrain.importers.target import TargetFiles

importers = Registry("layout", "drafttrain.importers")


@dataclass(frozen=True)
class Given:
    """A folder that somebody else made, in memory."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, str]
    """The file that each tensor is in."""
    notes: Sequence[str] = ()

    @property
    def architectures(self) -> set[str]:
        """The classes that config.json names."""
        named = self.config.get("architectures")
        return {one for one in named if isinstance(one, str)} if isinstance(named, list) else set()

    @property
    def weights(self) -> str:
        """The names of the files of weights, for a message on a tensor that is in none of them."""
        return ", ".join(sorted(set(self.files.values())))


@dataclass
class Imported:
    """What a layout makes of a folder."""

    files: DrafterFiles
    problems: list[str] = field(default_factory=list)
    """What must be mended first; the files are worth nothing while there is one."""
    notes: list[str] = field(default_factory=list)
    """What was filled in, dropped or renumbered, in words."""


class Importer(ABC):
    """One layout."""

    holds: ClassVar[str]
    """The kind of drafter that it holds."""
    known_by: ClassVar[str]
    """What tells it from the others, for the message that nothing did."""

    @abstractmethod
    def recognises(self, given: Given) -> bool:
        """Tell whether a folder is of this layout; at most one may."""

    @abstractmethod
    def target_of(self, given: Given) -> str | None:
        """Return the target that the folder itself names."""

    @abstractmethod
    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files under our names, with every problem of the folder."""
