"""DFlash2 in the published layout: z-lab's block, with convolutions around its sublayers and `candidate_selector` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drafttrain.core.printable import shown
from drafttrain.drafters.dflash2.dflash2 import FIELDS, DFlash2, field_problems, further_shapes
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.target_logits import cap_of, scale_of
from drafttrain.importers import Claim, Given, Imported, Importer, importers
from drafttrain.importers.dflash import NESTED, OWN, dflash_files, nested_problems
from drafttrain.importers.fields import layer_problems
from drafttrain.importers.naming import renamed, unwrapped, without
from drafttrain.importers.target import TargetFiles

FURTHER = ("_conv.", "candidate_selector.")
"""In the names of the tensors that DFlash does not have."""
ARCHITECTURES = ("DFlash2DraftModel", "Qwen3DFlash2DraftModel")
SCALES = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")


@dataclass
class DFlash2Layout:
    """DFlash2 of z-lab, and of NeMo Automodel."""


@importers.register("dflash2", DFlash2Layout)
class DFlash2Importer(Importer):
    """DFlash's block, whose size may be in `dflash_config`. Logits are scaled and capped as the target's, embeddings not at all."""

    holds: ClassVar[str] = "dflash2"
    claim = Claim.VARIANT
    known_by: ClassVar[str] = f"architectures {' or '.join(ARCHITECTURES)} in config.json"

    def recognises(self, given: Given) -> bool:
        """Return whether config.json names DFlash2."""
        return bool(given.architectures & set(ARCHITECTURES))

    def target_of(self, given: Given) -> str | None:
        """Return None: the layout has no field for it."""
        return None

    def convert(self, given: Given, target: TargetFiles) -> Imported:
        """Return the drafter's files."""
        given, nested = unwrapped(given), given.config.get(NESTED)
        if not isinstance(nested, Mapping):
            line = f"config.json: {NESTED} must be a mapping, got {shown(nested)}"
            return Imported(DrafterFiles(self.holds, {}, {}), [line])
        found, notes = nested_problems(nested, further=[*FIELDS, *SCALES, "block_size"])
        found += _scale_problems(nested, target)
        wrong, more = layer_problems(given.config, own=OWN)
        found, notes = [*found, *wrong], [*notes, *more]
        further = {name for name in given.tensors if any(part in name for part in FURTHER)}
        sizes = [where["block_size"] for where in (given.config, nested) if where.get("block_size") is not None]
        size = sizes[0] if sizes else None
        if not sizes or sizes[-1] != size:
            found.append(
                f"config.json: block_size, on the first level or in {NESTED}, must be one number, got {shown(sizes)}"
            )
        block = dflash_files(replace(without(given, further), config={**given.config, "block_size": size}), target)
        found, notes = [*found, *block.problems], [*notes, *block.notes]
        config = _with_own_fields(block.files.config, nested)
        found += [f"config.json: {line}" for line in field_problems(config)]
        if found:
            return Imported(DrafterFiles(self.holds, config, {}), found, notes)
        only_further = without(given, given.tensors.keys() - further)
        tensors, wrong = renamed(only_further, further_shapes(config), ours=_plain, theirs=str)
        return Imported(DrafterFiles(self.holds, config, {**block.files.tensors, **tensors}), wrong, notes)


def _plain(name: str) -> str:
    """Return the name of a codebook, which some writers store as the weight of an embedding."""
    return name.removesuffix(".weight") if name.endswith("codebook.weight") else name


def _with_own_fields(config: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the fields that DFlash does not have."""
    of_block = {**config.get(NESTED, {}), **{key: nested.get(key) for key in FIELDS}}
    return {
        **config,
        "architectures": [DFlash2.architecture],
        NESTED: of_block,
        "drafttrain": DFlash2.own_defaults(),
    }


def _scale_problems(nested: Mapping[str, Any], target: TargetFiles) -> list[str]:
    """Return factors that drafttrain does not apply: it reads the target's embedding and head as the target does."""
    applied = dict(zip(SCALES, (1, scale_of(target.config), cap_of(target.config)), strict=True))
    return [
        f"config.json: {NESTED}.{key} is {shown(given)}, must be {shown(value)}: drafttrain reads the target's embedding and head "
        "as the target does"
        for key, value in applied.items()
        if (given := nested.get(key)) is not None and (given or None) != (value or None)
    ]
