"""DSpark as DeepSpec writes it: a DFlash block, a Markov head, a confidence head, with copies of the target's embedding and head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drafttrain.drafters.dspark.dspark import FIELDS, DSpark
from drafttrain.drafters.dspark.markov import head_shapes
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.importers import Given, Imported, Importer, importers
from drafttrain.importers.dflash import OWN as OF_BLOCK
from drafttrain.importers.dflash import dflash_files
from drafttrain.importers.fields import layer_problems
from drafttrain.importers.naming import renamed, unwrapped, without
from drafttrain.importers.target import TargetFiles

HEADS = ("markov_head.", "confidence_head.")
OWN = (*OF_BLOCK, *FIELDS.values(), "num_anchors")


@dataclass
class DSparkLayout:
    """DSpark of DeepSpec."""


@importers.register("dspark", DSparkLayout)
class DSparkImporter(Importer):
    """`target_layer_ids` are blocks whose output is read, one less than drafttrain's taps. The root's slot predicts.

    A confidence head is optional, as are its fields.
    """

    holds: ClassVar[str] = "dspark"
    known_by: ClassVar[str] = f"architectures {DSpark.architecture}"

    def recognises(self, given: Given) -> bool:
        """Return whether config.json names DeepSpec's class."""
        return DSpark.architecture in given.architectures

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout has no field for it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        found, notes = layer_problems(given.config, own=OWN)
        made = dspark_files(unwrapped(given), target)
        return Imported(made.files, [*found, *made.problems], [*notes, *made.notes])


def dspark_files(given: Given, target: TargetFiles) -> Imported:
    """Return the files of a drafter from a configuration of one level, with DeepSpec's fields of the heads."""
    heads = {name for name in given.tensors if name.startswith(HEADS)}
    block = dflash_files(without(given, heads), target)
    found = list(block.problems)
    config = {**block.files.config, **_own_fields(given)}
    found += [f"config.json: {line}" for line in DSpark.problems_of(config)]
    if found:
        return Imported(DrafterFiles(DSpark.kind, config, {}), found, block.notes)
    only_heads = replace(given, tensors={name: given.tensors[name] for name in given.tensors if name in heads})
    tensors, wrong = renamed(only_heads, head_shapes(config), ours=str, theirs=str)
    return Imported(DrafterFiles(DSpark.kind, config, {**block.files.tensors, **tensors}), wrong, block.notes)


def _own_fields(given: Given) -> dict[str, Any]:
    """Return the fields of the heads, and of a block whose root's slot predicts."""
    config = given.config
    own = DSpark.own_defaults()
    if isinstance(anchors := config.get("num_anchors"), int) and anchors > 0:
        own["anchors"] = anchors
    return {
        "architectures": [DSpark.architecture],
        "sample_from_anchor": config.get("sample_from_anchor", True),
        "markov_rank": config.get("markov_rank"),
        "markov_head_type": config.get("markov_head_type", "vanilla"),
        "enable_confidence_head": config.get("enable_confidence_head", False),
        "confidence_head_with_markov": config.get("confidence_head_with_markov", False),
        "drafttrain": own,
    }
