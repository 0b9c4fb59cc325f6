"""A next-token-prediction layer in a model's own checkpoint: the model is its target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.mtp.files import own_tensors
from drafttrain.drafters.mtp.layouts import LAYOUTS, Layout, layout_in
from drafttrain.drafters.mtp.module import new_config, own_defaults
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.layout import LAYOUTS as FILE_LAYOUTS
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.naming import renamed
from drafttrain.importers.target import TargetFiles
from drafttrain.target_model import Target
from drafttrain.target_model.meta_model import meta_model


@dataclass
class MtpLayout:
    """A next-token-prediction layer in a checkpoint."""


@importers.register("mtp", MtpLayout)
class MtpImporter(Importer):
    """The layer alone becomes the drafter folder; the other tensors of the checkpoint are the target's."""

    holds: ClassVar[str] = "mtp"
    known_by: ClassVar[str] = (
        "tensors model.mtp_layers.0.input_proj.weight, or model.layers.N.eh_proj.weight after N layers"
    )

    def recognises(self, given: Given) -> bool:
        """Return whether the checkpoint has such a layer."""
        blocks = given.config.get("num_hidden_layers")
        return type(blocks) is int and bool(_first_keys(blocks) & given.tensors.keys())

    def target_of(self, given: Given) -> str | None:
        """Return the checkpoint itself."""
        return str(given.folder)

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the layer's files."""
        num_blocks = given.config["num_hidden_layers"]
        try:
            layout = layout_in(given.tensors, num_blocks, where=str(given.folder))
            config = new_config(_without_weights(target), layout, own=own_defaults())
        except CheckpointError as error:
            return Imported(DrafterFiles(self.holds, {}, {}), [str(error)])
        prefix = layout.prefix_for(num_blocks)
        stored = {name.removeprefix(prefix): name for name in given.tensors if name.startswith(prefix)}
        own = own_tensors(
            {short: given.tensors[name] for short, name in stored.items() if short not in layout.copies}, layout
        )
        layer = replace(
            given, tensors=own, files={name: given.files[_stored_name(name, stored, layout)] for name in own}
        )
        tensors, problems = renamed(layer, FILE_LAYOUTS[self.holds][0](config), ours=str, theirs=layout.stored)
        return Imported(DrafterFiles(self.holds, config, tensors), problems)


def _first_keys(num_blocks: int) -> set[str]:
    return {f"{layout.prefix_for(num_blocks)}{layout.parts['fc']}.weight" for layout in LAYOUTS.values()}


def _stored_name(own: str, stored: dict[str, str], layout: Layout) -> str:
    """Return the full name of a tensor in the checkpoint, or of the first of those that it was made of."""
    short = layout.stored(own)
    parts = [name for name in stored if name.startswith(short.rpartition(".")[0])]
    return stored.get(short) or stored[parts[0]]


def _without_weights(files: TargetFiles) -> Target:
    """Return the target of a folder on the meta device."""
    device: Any = torch.device("cpu")
    model = meta_model(files.folder, dtype="float32", attention="sdpa", trust_remote_code=False, device=device)
    return Target(model, files.tokenizer, name=files.name, fingerprint=files.fingerprint)
