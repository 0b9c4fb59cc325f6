"""Export: one file a format. A format turns a drafter folder into what other loaders read, and refuses what they would drop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from drafttrain.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

exporters = Registry("export format", "drafttrain.export")


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter folder in memory: its kind, config.json, and the tensors of model.safetensors."""

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = field(default=())
    """What a format changed on its way, in words."""


class Exporter(ABC):
    """One format."""

    reads: ClassVar[Mapping[str, str]]
    """The kinds of drafter that it can hold, and how loaders of it call each."""
    readers: ClassVar[str]
    """Who reads it."""

    @abstractmethod
    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the files of this format.

        Args:
            target_config: config.json of the target.
        """

    @abstractmethod
    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what a loader of this format would refuse, or drop without a word."""
