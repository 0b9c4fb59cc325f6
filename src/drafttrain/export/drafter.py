"""How a drafter becomes a drafter folder: its weights, what it calibrates on held-out texts, what is known about it.

A run's start, its best weights and every online version go through here, so none of them misses a part.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import About
from drafttrain.core.batches import DraftBatch
from drafttrain.core.files import folder_beside, write_json
from drafttrain.core.texts import Record
from drafttrain.data_gen.groups import groups
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter, drafters
from drafttrain.eval.replay import Text
from drafttrain.export.hf import export_hf
from drafttrain.target_model import Target


@dataclass(frozen=True)
class CalibrationTexts:
    """Held-out texts of the target, and its outputs on them."""

    texts: Sequence[Text]
    target: Target
    """The target, or one that answers on these texts from stored outputs."""


@dataclass(frozen=True)
class DrafterExporter:
    """Writes the drafter folders of one drafter."""

    about: About
    """`trained_steps` is replaced by each export."""
    tokenizer: Any
    dtype: str
    """Type of the exported weights."""
    calibration: Callable[[], CalibrationTexts]
    """Called only for a kind that calibrates."""

    def from_memory(self, drafter: Drafter, folder: Path, *, steps: int) -> None:
        """Export a drafter that is loaded."""
        weights = folder.with_name(f".{folder.name}.weights.part")
        with folder_beside(weights) as temporary:
            drafter.save(temporary)
        self._export(weights, folder, steps=steps, loaded=lambda _: drafter)
        shutil.rmtree(weights)

    def from_weights(self, weights: Path, folder: Path, *, steps: int) -> None:
        """Export the weights that `Drafter.save` wrote during training."""
        component: Any = drafters.entry(self.about.kind).component
        self._export(weights, folder, steps=steps, loaded=lambda target: component.load(weights, target))

    def _export(self, weights: Path, folder: Path, *, steps: int, loaded: Callable[[Target], Drafter]) -> None:
        component: Any = drafters.entry(self.about.kind).component
        if component.calibrate is not Drafter.calibrate:
            texts = self.calibration()
            for name, content in calibrated(loaded(texts.target), texts).items():
                write_json(weights / name, content)
        about = replace(self.about, trained_steps=steps)
        export_hf(weights, folder, tokenizer=self.tokenizer, about=about, dtype=self.dtype)


def calibrated(drafter: Drafter, texts: CalibrationTexts) -> Mapping[str, Any]:
    """Return the files that a drafter calibrates on held-out texts, by name; the drafter stays on its device."""
    own, device = drafter.device, texts.target.device
    target = drafter.adapted(texts.target)
    files = drafter.to(device).calibrate(target, _batches(texts.texts, device))
    drafter.to(own)
    return files


def _batches(texts: Sequence[Text], device: Any) -> Iterator[DraftBatch]:
    for group in groups([len(text.prompt) + len(text.new) for text in texts]):
        records = [
            Record(text.id, [*text.prompt, *text.new], [False] * len(text.prompt) + [True] * len(text.new))
            for text in (texts[i] for i in group)
        ]
        batch, _ = pack(records, width=max(len(record.tokens) for record in records), weight_of_step=1.0)
        yield batch.to(device)
