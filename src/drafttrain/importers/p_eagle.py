"""P-EAGLE in the layout that vLLM reads: EAGLE-3's with several layers, a mask token, and the vector of the mask slots.

V = the target's vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from drafttrain.core.printable import shown
from drafttrain.drafters.p_eagle.settings import OWN as SETTINGS
from drafttrain.drafters.p_eagle.settings import OWN_EMBEDDING, PEagleSettings, field_problems
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.importers import Claim, Given, Imported, importers
from drafttrain.importers.copies import without_copies
from drafttrain.importers.eagle3 import OWN as OF_EAGLE3
from drafttrain.importers.eagle3 import Eagle3Importer, draft_length, files_of
from drafttrain.importers.naming import unwrapped
from drafttrain.importers.target import TargetFiles

MASKS = ("mask_token_id", "pard_token", "ptd_token_id")
"""The fields that vLLM takes the mask token from, the first one first."""

MASK_HIDDEN = "mask_hidden"
P_EAGLES = {"PEagleSpeculator", "PEagleDraftModel", "PeagleLlamaForCausalLM"}

OWN = (*OF_EAGLE3, *MASKS, OWN_EMBEDDING, "num_hidden_layers")
EMBEDDING = "embed_tokens.weight"


@dataclass
class PEagleLayout:
    """P-EAGLE, as vLLM reads it."""


@importers.register("p_eagle", PEagleLayout)
class PEagleImporter(Eagle3Importer):
    """EAGLE-3's names, layers.1 and further ones, and mask_hidden. An embedding that differs from the target's is kept."""

    holds: ClassVar[str] = "p_eagle"
    claim = Claim.VARIANT
    fields: ClassVar[tuple[str, ...]] = OWN
    known_by: ClassVar[str] = f"architectures {' or '.join(sorted(P_EAGLES))}, or a tensor {MASK_HIDDEN}"

    def recognises(self, given: Given) -> bool:
        """Return whether the architecture or a tensor is P-EAGLE's."""
        return bool(given.architectures & P_EAGLES) or MASK_HIDDEN in unwrapped(given).tensors

    def files(self, given: Given, target: TargetFiles, *, taps: list[int]) -> Imported:
        """Return the files of a drafter with these taps, from a configuration of one level."""
        return p_eagle_files(given, target, taps=taps)

    def norm_output_notes(self, given: Given) -> list[str]:
        """Return that the field has no effect."""
        return []


def p_eagle_files(given: Given, target: TargetFiles, *, taps: list[int]) -> Imported:
    """Return the files of a drafter with these taps, from a configuration of one level."""
    length, notes = draft_length(given.config), []
    settings = PEagleSettings() if length is None else PEagleSettings(num_depths=length)
    if length is None:
        notes.append(
            f"no field tells how many tokens it was trained to draft: set to {settings.num_depths}; "
            "change drafttrain.num_depths in config.json"
        )
    found: list[str] = []
    own_embedding = _differs(given, target)
    if not own_embedding:
        given, found, dropped = without_copies(given, {EMBEDDING: target.embedding}, target)
        notes += dropped
    own = {
        "norm_output": False,
        "num_hidden_layers": given.config.get("num_hidden_layers") or 1,
        "mask_token_id": _mask_token(given.config),
        OWN_EMBEDDING: own_embedding,
        "drafttrain": {name: getattr(settings, name) for name in SETTINGS},
    }
    if wrong := field_problems({**own, "vocab_size": given.config.get("vocab_size")}):
        return Imported(DrafterFiles("p_eagle", {}, {}), [*found, *wrong], notes)
    if (most := len(given.tensors)) < own["num_hidden_layers"]:
        found.append(
            f"config.json: num_hidden_layers is {shown(own['num_hidden_layers'])}, but there are {most} tensors"
        )
        return Imported(DrafterFiles("p_eagle", {}, {}), found, notes)
    made = files_of("p_eagle", given, target, taps=taps, own=own)
    return Imported(made.files, [*found, *made.problems], [*notes, *made.notes])


def _mask_token(config: Mapping[str, Any]) -> Any:
    """Return the mask token; None: no field names it."""
    return next((config[key] for key in MASKS if config.get(key) is not None), None)


def _differs(given: Given, target: TargetFiles) -> bool:
    """Return whether the drafter has an embedding of its own: one of the target's shape with other values."""
    own_VD, theirs_VD = given.tensors.get(EMBEDDING), target.embedding
    if own_VD is None or theirs_VD is None or own_VD.shape != theirs_VD.shape:
        return False
    return not torch.equal(own_VD, theirs_VD.to(own_VD.dtype))
