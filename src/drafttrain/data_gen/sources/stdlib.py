"""The standard library's own source and documentation: text that every machine with Python has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

from drafttrain.core.settings import setting
from drafttrain.data_gen.sources import Item, WeightedSettings, sources
from drafttrain.data_gen.stdlib_text import documents

SMOKE_MODULES = 8


@dataclass(kw_only=True)
class StdlibSettings(WeightedSettings):
    """Source and documentation of Python's standard library, split by module."""

    split: Literal["train", "held_out"] = setting(
        "train", help="Side of the split; evaluation prompts are cut from held_out."
    )

    def smoke(self) -> Self:
        """Return a copy that reads a few modules: each gives hundreds of prompts."""
        return replace(self, max_items=min(self.max_items or SMOKE_MODULES, SMOKE_MODULES))


@sources.register("stdlib", StdlibSettings)
class Stdlib:
    """The documents of one side."""

    def __init__(self, settings: StdlibSettings) -> None:
        self.split: Literal["train", "held_out"] = settings.split

    def items(self) -> Iterator[Item]:
        """Yield every document."""
        for name, text in documents(self.split):
            yield Item(name, {"id": name, "text": text})
