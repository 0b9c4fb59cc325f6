"""Export of a next-token-prediction layer: the target's checkpoint with the layer's tensors replaced, for vLLM and transformers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drafttrain.checkpoint import ABOUT
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import check_folder
from drafttrain.core.tensors import TensorFiles
from drafttrain.drafters.mtp.files import checkpoint_tensors, stitch, stored_names
from drafttrain.drafters.mtp.layouts import LAYOUTS, Layout, layout_in
from drafttrain.export import FOLDER, Exporter, exporters
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import kind_of, read_config
from drafttrain.export.layout import layout_problems, text_config


@dataclass
class CheckpointFormat:
    """The target's checkpoint with its next-token-prediction layer replaced."""


@exporters.register("checkpoint", CheckpointFormat)
class CheckpointExporter(Exporter):
    """A whole model folder: serve it as the target, and the engine finds the layer in it.

    Only files with a replaced tensor are written; the others are hard links to the target's where the file system allows it. The
    target's own folder is not changed. Replaced tensors get the type that they have in the target's files.
    """

    reads: ClassVar[Mapping[str, str]] = {"mtp": "mtp"}
    readers = "vLLM (method mtp), transformers (use_mtp, deepseek layout)"

    def target_problems(self, folder: Path, *, num_rows: int, end: int | None) -> list[str]:
        """Return that the target has no layer whose tensors could be replaced."""
        try:
            _layout_of(folder)
        except CheckpointError as error:
            return [str(error)]
        return []

    def refusals(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return why the drafter's tensors cannot take the place of the target's."""
        if problems := layout_problems(source, target_config):
            return problems
        folder, own = Path(target_config[FOLDER]), source.config["layout"]
        if problems := self.target_problems(folder, num_rows=0, end=None):
            return problems
        if (theirs := _layout_of(folder).name) != own:
            return [f"config.json: layout is {own}, the target's layer has the layout {theirs}"]
        return []

    def convert(self, source: DrafterFiles, target_config: Mapping[str, Any]) -> DrafterFiles:
        """Return the layer's tensors under the target's names and in its types, with the target's config.json."""
        folder = Path(target_config[FOLDER])
        layout, files = LAYOUTS[source.config["layout"]], TensorFiles(folder)
        names = stored_names(files, layout, _num_blocks(folder))
        stored = checkpoint_tensors(source.tensors, layout)
        types = {short: files.read(name).dtype for short, name in names.items()}
        tensors = {names.get(short, short): stored[short].to(types.get(short)) for short in stored}
        return replace(source, config=read_config(folder), tensors=tensors, folder=folder)

    def problems(self, files: DrafterFiles, target_config: Mapping[str, Any]) -> list[str]:
        """Return tensors that the target's checkpoint lacks or has in another shape."""
        held = TensorFiles(Path(target_config[FOLDER]))
        known = set(held.names())
        found = [f"{name}: the target's checkpoint has no such tensor" for name in files.tensors if name not in known]
        return found + [
            f"{name}: shape {list(tensor.shape)}, {list(held.read(name).shape)} in the target's checkpoint"
            for name, tensor in files.tensors.items()
            if name in known and held.read(name).shape != tensor.shape
        ]

    def write(self, files: DrafterFiles, source: Path, folder: Path) -> None:
        """Write the target's checkpoint with the layer in it, and drafttrain.json of the drafter."""
        assert files.folder is not None, "`convert` names the target's folder"
        stitch(files.folder, files.tensors, folder)
        shutil.copyfile(source / ABOUT, folder / ABOUT)

    def read(self, folder: Path) -> DrafterFiles:
        """Return the layer's tensors under their names in the checkpoint.

        Raises:
            CheckpointError: It has no such layer.
        """
        check_folder(folder)
        layout, files = _layout_of(folder), TensorFiles(folder)
        names = stored_names(files, layout, _num_blocks(folder)).values()
        return DrafterFiles(
            kind_of(folder), read_config(folder), {name: files.read(name) for name in names}, folder=folder
        )

    def holds(self, folder: Path) -> bool:
        """Return whether this is a model folder with such a layer, and drafttrain.json beside it."""
        if not super().holds(folder) or not (folder / ABOUT).is_file():
            return False
        return not self.target_problems(folder, num_rows=0, end=None)


def _layout_of(folder: Path) -> Layout:
    return layout_in(TensorFiles(folder).names(), _num_blocks(folder), where=str(folder))


def _num_blocks(folder: Path) -> int:
    blocks = text_config(read_config(folder)).get("num_hidden_layers")
    if type(blocks) is not int:
        raise CheckpointError(f"{folder}/config.json: num_hidden_layers must be a whole number, got {blocks!r:.60}")
    return blocks
