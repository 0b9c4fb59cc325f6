"""Importers: a file for each layout. A layout converts a folder trained elsewhere to a drafter folder, or lists all problems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from drafttrain.core.registry import Registry
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.importers.target import TargetFiles

importers = Registry("layout", "drafttrain.importers")


@dataclass(frozen=True)
class Given:
    """A folder trained elsewhere, in memory."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, str]
    """The file of each tensor."""
    notes: Sequence[str] = ()

    @property
    def architectures(self) -> set[str]:
        """The classes named in config.json."""
        named = self.config.get("architectures")
        return {one for one in named if isinstance(one, str)} if isinstance(named, list) else set()

    @property
    def weights(self) -> str:
        """The names of the weight files, for messages about missing tensors."""
        return ", ".join(sorted(set(self.files.values())))


@dataclass
class Imported:
    """The result of converting a folder."""

    files: DrafterFiles
    problems: list[str] = field(default_factory=list)
    """What must be fixed first; with any problem the files are unusable."""
    notes: list[str] = field(default_factory=list)
    """What was filled in, dropped or renumbered, for the user."""


class Claim(IntEnum):
    """How much the mark of a layout says. A folder can have several marks; the one that says most decides."""

    MODEL = 0
    """A model of transformers, which may be any drafter."""
    PART = 1
    """A tensor that other kinds have too."""
    KIND = 2
    """A kind of drafter."""
    VARIANT = 3
    """A kind whose folders have the mark of the kind that it extends too."""
    FORMAT = 4
    """A format of several kinds, whose tensors have the names of other layouts."""


class Importer(ABC):
    """One layout."""

    claim: ClassVar[Claim] = Claim.KIND
    """How much its mark says."""
    holds: ClassVar[str]
    """The kind of drafter."""
    known_by: ClassVar[str]
    """How it is recognised, for the message that a folder has no known layout."""

    @abstractmethod
    def recognises(self, given: Given) -> bool:
        """Return whether a folder has the mark of this layout."""

    @abstractmethod
    def target_of(self, given: Given) -> str | None:
        """Return the target that the folder names; None: it names none."""

    @abstractmethod
    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files under drafttrain's names, with all problems of the folder."""
