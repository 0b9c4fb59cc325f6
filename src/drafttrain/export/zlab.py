"""Export of DFlash2 as z-lab publishes it. Written after the source of vLLM, whose class runs on GPUs only, so it was not tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.export import Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_config
from drafttrain.export.layout import layout_problems


@dataclass
class ZlabFormat:
    """DFlash2 as z-lab publishes it."""


@exporters.register("zlab", ZlabFormat)
class ZlabExporter(Exporter):
    """The folder's own tensors and fields, without drafttrain's; the size of a block is in `dflash_config`, too.

    Readers draft `block_size` - 1 tokens. vLLM's convolutions take 1 + num_speculative_tokens for the size of a block.
    """

    reads: ClassVar[Mapping[str, str]] = {"dflash2": "dflash"}
    readers = "vLLM on GPUs, where it was not run by this project"

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what the layout has no field for."""
        found = []
        if source.config.get("sample_from_anchor"):
            found.append(
                "config.json: sample_from_anchor is true: readers take slot s for a guess of token s, so all drafts would be "
                "one place off: train with drafter.sample_from_anchor=false"
            )
        if (rows := source.config.get("draft_vocab_size")) is not None:
            found.append(
                f"config.json: draft_vocab_size is {rows}: readers have the target's vocabulary and head only: train with "
                "drafter.draft_vocab_size=null"
            )
        return found

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the files with the published fields."""
        config = {key: value for key, value in source.config.items() if not key.startswith("drafttrain")}
        size = config["block_size"]
        config["dflash_config"] = {**config["dflash_config"], "block_size": size}
        config["is_causal"] = config["dflash_config"]["causal"]
        note = f"serve it with num_speculative_tokens {size - 1}: the convolutions read blocks of the size of training"
        return replace(source, config=config, notes=(*source.notes, note))

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return what readers would refuse or drop."""
        return [*self.refusals(files, target_config), *layout_problems(files, target_config)]

    def holds(self, folder: Path) -> bool:
        """Return whether this is such a folder: config.json has none of drafttrain's fields."""
        return super().holds(folder) and "drafttrain" not in read_config(folder)
